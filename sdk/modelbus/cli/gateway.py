"""serve, version, completion."""

from __future__ import annotations

import os
import sys

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
@click.option("--ssl-keyfile", default="", help="TLS key, PEM.")
@click.option("--ssl-certfile", default="", help="TLS certificate chain, PEM.")
@click.option("--uvicorn-log-level", "--log-level", "log_level", default="info", show_default=True)
@click.option("--template", "--prompt-template", "template", default="auto", hidden=True)
@bus_options
def serve(
    host: str, port: int, processes: int, api_key: str, served_model_name: tuple[str, ...], response_role: str,
    allowed_origins: tuple[str, ...], allowed_methods: tuple[str, ...], allowed_headers: tuple[str, ...],
    allow_credentials: bool, ssl_keyfile: str, ssl_certfile: str, log_level: str, template: str, address: str, creds: str,
) -> None:  # fmt: skip
    """Serve the models to OpenAI clients over HTTP, in the foreground."""
    if template != "auto":
        raise click.UsageError("--template: the model's own chat template is used; leave the flag out")
    arguments = ["--host", host, "--port", str(port), "--processes", str(processes)]
    arguments += ["--response-role", response_role, "--log-level", log_level]
    for flag, value in (
        ("--ssl-keyfile", ssl_keyfile), ("--ssl-certfile", ssl_certfile), ("--address", address), ("--creds", creds),
    ):  # fmt: skip
        arguments += [flag, value] if value else []
    for flag, values in (
        ("--served-model-name", served_model_name), ("--allowed-origins", allowed_origins),
        ("--allowed-methods", allowed_methods), ("--allowed-headers", allowed_headers),
    ):  # fmt: skip
        arguments += [flag, *values] if values else []
    arguments += ["--allow-credentials"] if allow_credentials else []
    environment = dict(os.environ)
    if api_key and "MODELBUS_API_KEY" not in environment:
        # Not as an argument: those can be read by everybody on the host.
        environment["MODELBUS_API_KEY"] = api_key
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "modelbus_gateway", *arguments], environment)


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
