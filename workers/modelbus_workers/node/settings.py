"""What a node is told when it starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.settings import BusSettings, bus_settings, home


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One node. ``None`` for a resource means all that the host has."""

    bus: BusSettings
    home: Path
    labels: dict[str, str] = {}
    cpus: float | None = None
    gpus: int | None = None  #: how many; more than NVML shows are taken on trust
    memory_mb: int | None = None
    heartbeat_s: float = 3.0
    claim_ttl_s: int = 30  #: a claim that is not renewed for so long is free
    renew_s: float = 5.0
    hold_off_s: float = 10.0  #: after a reconnect, no replica is claimed that did not run here
    spread_s: float = 0.05  #: wait per replica already held before another is claimed
    backoff_first_s: float = 0.5  #: before a crashed worker is started again; doubles
    backoff_most_s: float = 30.0
    again_s: float = 5.0  #: before a start that failed for want of another server is tried again
    log_level: str = "INFO"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def exclusive_stop_s(self) -> float:
        """Silence of the bus after which an ``exclusive`` replica stops itself: before its claim can expire."""
        return self.claim_ttl_s * 2 / 3


def parse(arguments: Sequence[str]) -> NodeSettings:
    """The settings in a command line; exits with status 2 when it is wrong.

    Raises:
        BusUnavailable: nothing says where the bus is.
        ConfigurationError: a value cannot be.
    """
    parser = argparse.ArgumentParser(prog="python -m modelbus_workers.node", description="Runs workers on this host.")
    parser.add_argument("--address", default="", help="nats://HOST:PORT; default: the bus of this host")
    parser.add_argument("--creds", default="", help="credential file")
    parser.add_argument("--tls-ca", default="", help="PEM file of the authority that signed the bus's certificate")
    parser.add_argument("--tls-cert", default="")
    parser.add_argument("--tls-key", default="")
    parser.add_argument("--label", action="append", default=[], metavar="K=V", help="offer this label")
    parser.add_argument("--cpus", type=float, help="offer so many CPUs instead of all")
    parser.add_argument("--gpus", type=int, help="offer so many GPUs instead of all")
    parser.add_argument("--memory-mb", type=int, help="offer so much memory instead of all")
    parser.add_argument("--home", default="", help="folder of the node's state; default: MODELBUS_HOME or ~/.modelbus")
    parser.add_argument("--claim-ttl-s", type=int, default=30, help=argparse.SUPPRESS)
    parser.add_argument("--renew-s", type=float, default=5.0, help=argparse.SUPPRESS)
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    parsed = parser.parse_args(arguments)
    for name in ("cpus", "gpus", "memory_mb"):
        if (value := getattr(parsed, name)) is not None and value < 0:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is less than nothing")
    bus = bus_settings(
        parsed.address,
        _absolute(parsed.creds),
        tls_ca=_absolute(parsed.tls_ca),
        tls_cert=_absolute(parsed.tls_cert),
        tls_key=_absolute(parsed.tls_key),
    )
    return NodeSettings(
        bus=bus,
        home=Path(parsed.home).expanduser().resolve() if parsed.home else home(),
        labels=parse_labels(parsed.label),
        cpus=parsed.cpus,
        gpus=parsed.gpus,
        memory_mb=parsed.memory_mb,
        claim_ttl_s=parsed.claim_ttl_s,
        renew_s=parsed.renew_s,
        log_level=parsed.log_level,
    )


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """``["disk=ssd"]`` as a dict.

    Raises:
        ConfigurationError: one has no ``=`` or no name.
    """
    labels = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(f"{text!r} is not a label: write NAME=VALUE")
        labels[name.strip()] = value.strip()
    return labels


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""
