"""serve, version, completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import get_completion_class

from .main import SeedCommand, bus_options, cli


class PortRange(click.IntRange):
    """A port; the error names the valid range."""

    name = "port"

    def __init__(self) -> None:
        super().__init__(1, 65535)

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> None:  # type: ignore[override]
        raise click.BadParameter(f"{message} A port is a number from 1 to 65535.", ctx=ctx, param=param)


@click.command(cls=SeedCommand)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=PortRange(), default=8000, show_default=True)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="That share the port.")
@click.option("--api-key", default="", help="Clients must send it; or env:NAME, file:PATH. MODELBUS_API_KEY wins.")
@click.option("--served-model-name", multiple=True, metavar="NAME[=MODEL] ...", help="Another name for a model.")
@click.option("--response-role", default="assistant", show_default=True)
@click.option("--allowed-origins", multiple=True, help="CORS; default *.")
@click.option("--allowed-methods", multiple=True, help="CORS; default *.")
@click.option("--allowed-headers", multiple=True, help="CORS; default *.")
@click.option("--allow-credentials", is_flag=True, help="CORS: cookies from other origins.")
@click.option("--allow-adapter-updates", is_flag=True, help="Clients may add and remove adapters.")
@click.option("--embedding-model", default="", help="Of vector stores that name none (default: searched by words).")
@click.option("--rewrite-model", default="", help="Chat model for searches with rewrite_query.")
@click.option("--search-service", default="", help="In which vector stores are made (default: storage).")
@click.option("--files-root", default="", help="Folder or s3://BUCKET/PREFIX for uploads of more than 64 MiB.")
@click.option("--max-file-mb", type=float, help="Largest file there, MiB (default: 512).")
@click.option("--max-body-mb", type=float, help="Largest request body, MiB (default: 64).")
@click.option("--prices", default="", help="JSON file with what tokens cost, for the metrics.")
@click.option("--client-stall", type=float, help="Cut a client that takes nothing for so many seconds (default: 60).")
@click.option("--headers-after", type=float, help="A stream's headers wait so many seconds (default: 0.5).")
@click.option("--orphan-grace", type=float, help="Seconds that a stream goes on without its client (default: 30).")
@click.option("--shutdown-grace", type=float, help="Seconds for running requests after SIGTERM (default: 30).")
@click.option("--ssl-keyfile", default="", help="TLS key, PEM.")
@click.option("--ssl-certfile", default="", help="TLS certificate chain, PEM.")
@click.option("--uvicorn-log-level", "--log-level", "log_level", default="info", show_default=True)
@click.option("--template", "--prompt-template", "template", default="auto", hidden=True)
@click.option("--tls-ca", default="", help="Certificate authority of the bus, PEM.")
@click.option("--tls-cert", default="", help="Client certificate for the bus, PEM.")
@click.option("--tls-key", default="", help="Its key, PEM.")
@bus_options
def serve(api_key: str, template: str, **settings: Any) -> None:
    """Serve the models to OpenAI clients over HTTP, in the foreground."""
    if template != "auto":
        raise click.UsageError("--template: the model's own chat template is used; leave the flag out")
    environment = dict(os.environ)
    if api_key and "MODELBUS_API_KEY" not in environment:
        # Not as an argument: those can be read by everybody on the host.
        environment["MODELBUS_API_KEY"] = api_key
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "modelbus_gateway", *gateway_arguments(settings)], environment)


def gateway_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The command line of the gateway's process: it has the same flags, and its own defaults for what is not given."""
    arguments: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        match value:
            case None | "" | False | ():
                pass
            case True:
                arguments.append(flag)
            case tuple():
                arguments += [flag, *value]
            case _:
                arguments += [flag, str(value)]
    return arguments


@click.command(cls=SeedCommand)
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    click.echo(installed("modelbus"))


@click.command(cls=SeedCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for the shell: eval "$(modelbus completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "modelbus", "_MODELBUS_COMPLETE").source())
