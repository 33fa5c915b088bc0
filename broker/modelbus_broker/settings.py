"""Where the bus is and how to get in, read from arguments, the environment or this host's state file."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from .errors import BusUnavailable, ConfigurationError


class BusSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the bus."""

    url: str = ""  #: ``nats://host:port``; several with commas
    creds: str = ""  #: path of a credential file; "" = none
    tls_ca: str = ""  #: PEM files
    tls_cert: str = ""
    tls_key: str = ""
    connect_timeout_s: float = 2.0

    @property
    def urls(self) -> list[str]:
        return [url.strip() for url in self.url.split(",") if url.strip()]


class BusState(msgspec.Struct, frozen=True, kw_only=True):
    """What `modelbus start` leaves on a host for other commands there: ``bus.json`` in the home folder."""

    url: str
    pid: int = 0  #: of the process that holds the embedded server; 0: the bus is elsewhere
    creds: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    started_ms: int = 0


def home() -> Path:
    """The folder of this host's state: ``$MODELBUS_HOME`` or ``~/.modelbus``."""
    return Path(os.environ.get("MODELBUS_HOME") or Path.home() / ".modelbus")


def read_bus_state() -> BusState | None:
    """What `modelbus start` left on this host, if it did."""
    try:
        return msgspec.json.decode((home() / "bus.json").read_bytes(), type=BusState)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"{home() / 'bus.json'} cannot be read ({error}): remove it") from error


def bus_settings(
    address: str = "", creds: str = "", *, tls_ca: str = "", tls_cert: str = "", tls_key: str = ""
) -> BusSettings:
    """The bus to use: the arguments, else MODELBUS_ADDRESS and MODELBUS_CREDS, else what runs on this host.

    ``address`` "auto" means the same as "".

    Raises:
        BusUnavailable: nothing says where the bus is.
        ConfigurationError: the address has no usable form.
    """
    address = "" if address == "auto" else address
    url = address or os.environ.get("MODELBUS_ADDRESS", "")
    creds = creds or os.environ.get("MODELBUS_CREDS", "")
    if not url:
        state = read_bus_state()
        if state is None:
            raise BusUnavailable(
                "no bus is known on this host: start one with `modelbus start --head`, "
                "or name one with --address nats://HOST:PORT (MODELBUS_ADDRESS)"
            )
        return BusSettings(
            url=state.url, creds=creds or state.creds, tls_ca=tls_ca or state.tls_ca,
            tls_cert=tls_cert or state.tls_cert, tls_key=tls_key or state.tls_key,
        )  # fmt: skip
    url = ",".join(part if "://" in part else f"nats://{part}" for part in url.split(","))
    if not all(part.startswith(("nats://", "tls://", "ws://", "wss://")) for part in url.split(",")):
        raise ConfigurationError(f"{address or url!r} is no bus address: write nats://HOST:PORT")
    return BusSettings(url=url, creds=creds, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
