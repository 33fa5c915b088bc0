"""The root command, what all commands share, and how errors become exit codes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import click

EXIT_FAILED, EXIT_USAGE, EXIT_NO_BUS, EXIT_NOT_FOUND = 1, 2, 3, 4
#: Done, but for parts of what was given, which were named.
EXIT_INCOMPLETE = 5

#: Module of each command; a module is imported when its command is used.
COMMANDS = {
    "start": "hosts", "stop": "hosts", "status": "hosts",
    "deploy": "models", "undeploy": "models", "models": "models", "stat": "models", "logs": "models",
    "adapters": "adapters", "storage": "storage", "doc": "doc", "query": "ask", "cancel": "cancel", "jobs": "jobs", "dead": "dead", "serve": "gateway", "version": "gateway", "completion": "gateway",
}  # fmt: skip


#: Ends a list of values, as a long flag does.
_SHORT_FLAG = re.compile(r"-[a-zA-Z]")


def expand(arguments: Sequence[str], many: frozenset[str]) -> Iterator[str]:
    """Arguments in click's form: dashes inside flag names, and a flag of ``many`` before each of its values.

    ``--infer_params a=1 b=2 --model m`` becomes ``--infer-params a=1 --infer-params b=2 --model m``.
    """
    repeating = ""
    for index, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[index:]
            return
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            flag = flag.replace("_", "-")
            repeating = flag if flag in many else ""
            if not repeating or equals:
                yield flag + equals + value
        elif repeating and not _SHORT_FLAG.fullmatch(argument):
            yield repeating
            yield argument
        else:
            yield argument


class SeedCommand(click.Command):
    """A command whose flags may be written with ``_`` or ``-`` and take several values where they can repeat."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = frozenset(
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        )
        return super().parse_args(ctx, list(expand(args, many)))


class LazyGroup(click.Group):
    """Imports the module of a command when it is needed, so that help and completion are quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = COMMANDS.get(cmd_name)
        if home is None:
            return None
        command = getattr(import_module(f"modelbus.cli.{home}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Any large model, on any host, behind one durable bus."""


def bus_options(command: Any) -> Any:
    """The options that say where the bus is."""
    command = click.option("--creds", default="", help="Credential file for the bus (MODELBUS_CREDS).")(command)
    return click.option(
        "--address", default="", help="The bus, nats://HOST:PORT (MODELBUS_ADDRESS; default: the one on this host)."
    )(command)


def json_option(command: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON; the default when piped.")(command)


def main() -> None:
    """The ``modelbus`` script."""
    from modelbus_broker.errors import (
        AuthenticationFailed,
        BusUnavailable,
        ConfigurationError,
        ModelBusError,
        ModelNotFound,
        NotFound,
    )

    try:
        # Without standalone mode click gives back the status of a command that ended itself.
        sys.exit(cli(prog_name="modelbus", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; Python would complain about it at exit
        sys.exit(EXIT_FAILED)
    except ModelBusError as error:
        click.echo(f"Error: {error.message}", err=True)
        if error.upstream and error.upstream not in error.message:
            click.echo(f"The provider said: {error.upstream}", err=True)
        match error:
            case ConfigurationError():
                sys.exit(EXIT_USAGE)
            case BusUnavailable() | AuthenticationFailed():
                sys.exit(EXIT_NO_BUS)
            case ModelNotFound() | NotFound():
                sys.exit(EXIT_NOT_FOUND)
        sys.exit(EXIT_FAILED)
