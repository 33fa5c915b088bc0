"""How a gateway is set: arguments first, then the environment, read once at start.

The environment variable ``MODELBUS_API_KEY`` wins over ``--api-key``, so that a key need not be an argument, which
every user of the host can read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from modelbus.prices import PriceTable
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.settings import BusSettings, bus_settings

from .files.roots import open_root

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway process."""

    bus: BusSettings = BusSettings()
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    api_key: str = ""  #: "" = none is asked for
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str = ""
    ssl_certfile: str = ""
    response_role: str = "assistant"
    #: Other names that clients may use: name -> model. A model of "" means the only one that is deployed.
    served_model_names: Mapping[str, str] = {}
    allow_adapter_updates: bool = False  #: clients may add and remove adapters
    prices: str = ""  #: a JSON file with what tokens cost, for the metrics
    max_body_bytes: int = 64 * 1024 * 1024
    files_root: str = ""  #: a folder or s3://BUCKET/PREFIX for uploaded files that are too large for the bus; the same for all gateways
    max_file_bytes: int = 512 * 1024 * 1024  #: of one file there
    search_service: str = "storage"  #: in which vector stores are made
    embedding_model: str = ""  #: of vector stores that name none; "": they are searched by words
    rewrite_model: str = ""  #: the chat model that rewrites the queries of searches which ask for it
    headers_after_s: float = 0.5  #: a stream's headers wait so long for its first output, or for an error
    orphan_grace_s: float = 30.0  #: a resumable request goes on so long after its client has hung up
    keep_alive_comment_s: float = 15.0  #: silence on an event stream before a comment goes out
    client_stall_s: float = 60.0  #: a client that takes nothing for so long is cut
    shutdown_grace_s: float = 30.0  #: running requests have so long after SIGTERM
    log_level: str = "info"

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "api_key"}
        return f"GatewaySettings(api_key={'***' if self.api_key else ''!r}, {shown})"

    @property
    def address(self) -> str:
        """The URL that clients use."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.ssl_certfile else 'http'}://{host}:{self.port}"

    def price_table(self) -> PriceTable:
        """What tokens cost. Raises ConfigurationError: the file is missing or not of its form."""
        return PriceTable.read(self.prices) if self.prices else PriceTable({})

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, or None without certificate.

        Raises:
            ConfigurationError: a file is missing or not usable.
        """
        if not self.ssl_certfile and not self.ssl_keyfile:
            return None
        if not self.ssl_certfile:
            raise ConfigurationError("--ssl-keyfile needs --ssl-certfile beside it")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"--ssl-certfile {self.ssl_certfile} with --ssl-keyfile {self.ssl_keyfile or '(none)'}: {error}"
            ) from error
        return context


def gateway_settings(arguments: Sequence[str]) -> GatewaySettings:
    """Reads the command line, with ``-`` or ``_`` inside flag names, and the environment.

    Raises:
        SystemExit: the arguments make no sense (argparse has said why), or ``--help`` was asked for.
        ConfigurationError: a value or a file cannot be used.
        BusUnavailable: nothing says where the bus is.
    """
    given = _parser().parse_args([_dashed(argument) for argument in arguments])
    if not 1 <= given.port <= 65535:
        raise ConfigurationError(f"--port {given.port} is no port: choose one from 1 to 65535")
    if not 1 <= given.processes <= 256:
        raise ConfigurationError(f"--processes {given.processes}: choose a number from 1 to 256")
    for name in ("max_body_mb", "max_file_mb", "client_stall", "shutdown_grace"):
        if getattr(given, name) <= 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be more than 0")
    for name in ("headers_after", "orphan_grace"):
        if getattr(given, name) < 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must not be negative")
    settings = GatewaySettings(
        bus=bus_settings(
            given.address, given.creds, tls_ca=given.tls_ca, tls_cert=given.tls_cert, tls_key=given.tls_key
        ),
        host=given.host,
        port=given.port,
        processes=given.processes,
        api_key=secret(os.environ.get("MODELBUS_API_KEY", "") or given.api_key, "--api-key"),
        allowed_origins=_words(given.allowed_origins),
        allowed_methods=_words(given.allowed_methods),
        allowed_headers=_words(given.allowed_headers),
        allow_credentials=given.allow_credentials,
        ssl_keyfile=given.ssl_keyfile,
        ssl_certfile=given.ssl_certfile,
        response_role=given.response_role,
        served_model_names=_aliases(given.served_model_name),
        allow_adapter_updates=given.allow_adapter_updates,
        prices=given.prices,
        max_body_bytes=int(given.max_body_mb * 1024 * 1024),
        files_root=given.files_root,
        max_file_bytes=int(given.max_file_mb * 1024 * 1024),
        search_service=given.search_service,
        embedding_model=given.embedding_model,
        rewrite_model=given.rewrite_model,
        client_stall_s=given.client_stall,
        shutdown_grace_s=given.shutdown_grace,
        headers_after_s=given.headers_after,
        orphan_grace_s=given.orphan_grace,
        log_level=given.log_level,
    )
    settings.price_table()
    if settings.files_root:
        with contextlib.closing(open_root(settings.files_root)) as root:
            root.check()
    settings.tls()  # a file that cannot be used stops the program here and not in each process
    return settings


def secret(value: str, name: str) -> str:
    """The secret that a value stands for: ``env:NAME``, ``file:PATH`` or itself.

    Raises:
        ConfigurationError: the variable or the file is not there, or it is empty.
    """
    kind, colon, rest = value.partition(":")
    if not colon or kind not in ("env", "file"):
        return value
    if kind == "env":
        found = os.environ.get(rest, "")
    else:
        try:
            found = Path(rest).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{name} {value}: {error}") from error
    if not found:
        raise ConfigurationError(f"{name} {value}: it is empty or not set")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modelbus serve",
        description="Serves the models on the bus to OpenAI clients over HTTP.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: only this host)")
    add("--port", type=int, default=8000, help="1 to 65535 (default: 8000)")
    add("--processes", type=int, default=1, help="processes that share the port (default: 1)")
    add(
        "--address", default="", help="the bus: nats://HOST:PORT (default: MODELBUS_ADDRESS, else the one on this host)"
    )
    add("--creds", default="", help="credential file for the bus (default: MODELBUS_CREDS)")
    add("--tls-ca", default="", help="certificate authority of the bus, PEM")
    add("--tls-cert", default="", help="client certificate for the bus, PEM")
    add("--tls-key", default="", help="its key, PEM")
    add("--api-key", default="", help="key that clients must send, or env:NAME or file:PATH; MODELBUS_API_KEY wins")
    add("--allowed-origins", nargs="+", default=["*"], help="CORS: origins (default: *)")
    add("--allowed-methods", nargs="+", default=["*"], help="CORS: methods (default: *)")
    add("--allowed-headers", nargs="+", default=["*"], help="CORS: headers (default: *)")
    add("--allow-credentials", action="store_true", help="CORS: cookies and authorization from other origins")
    add("--ssl-keyfile", default="", help="TLS key, PEM")
    add("--ssl-certfile", default="", help="TLS certificate chain, PEM")
    add("--response-role", default="assistant", help="role in chat answers (default: assistant)")
    add(
        "--served-model-name", nargs="+", default=[], metavar="NAME[=MODEL]",
        help="another name for a model; without MODEL: for the only one that is deployed",
    )  # fmt: skip
    add(
        "--allow-adapter-updates", action="store_true",
        help="clients may add and remove adapters: POST /v1/load_lora_adapter, /v1/unload_lora_adapter",
    )  # fmt: skip
    add("--prices", default="", help="JSON file with what tokens cost, by model, for the metrics")
    add("--max-body-mb", type=float, default=64.0, help="largest request body, MiB (default: 64)")
    add(
        "--files-root",
        default="",
        help="folder or s3://BUCKET/PREFIX for uploaded files of more than 64 MiB; the same for all gateways",
    )
    add("--max-file-mb", type=float, default=512.0, help="largest file there, MiB (default: 512)")
    add("--search-service", default="storage", help="search service in which vector stores are made (default: storage)")
    add(
        "--embedding-model",
        default="",
        help="of vector stores that name none (default: none, they are searched by words)",
    )
    add("--rewrite-model", default="", help="chat model for searches with rewrite_query")
    add("--client-stall", type=float, default=60.0, help="cut a client that takes nothing for so many seconds (60)")
    add("--shutdown-grace", type=float, default=30.0, help="seconds that running requests have after SIGTERM (30)")
    add("--headers-after", type=float, default=0.5, help="a stream's headers wait so many seconds for its output (0.5)")
    add(
        "--orphan-grace",
        type=float,
        default=30.0,
        help="seconds that a resumable request goes on without a client (30)",
    )
    add("--log-level", default="info", choices=LOG_LEVELS, type=str.lower, help="(default: info)")
    return parser


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _words(values: Sequence[str]) -> tuple[str, ...]:
    """Several arguments, commas, and the seed's JSON list all mean the same."""
    if len(values) == 1 and values[0].startswith("["):
        try:
            return tuple(msgspec.json.decode(values[0], type=list[str]))
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{values[0]!r} is no JSON list of strings: {error}") from error
    return tuple(word.strip() for value in values for word in value.split(",") if word.strip())


def _aliases(values: Sequence[str]) -> dict[str, str]:
    aliases = {}
    for value in values:
        name, _, model = value.partition("=")
        if not name:
            raise ConfigurationError(f"--served-model-name {value!r}: write NAME or NAME=MODEL")
        aliases[name] = model
    return aliases
