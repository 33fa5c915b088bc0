"""dead: the requests that were given up."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
import msgspec
from modelbus_broker import dead as dead_letters
from modelbus_broker.dead import StoredLetter
from modelbus_broker.errors import ModelBusError

from ..answers import collect
from .main import SeedCommand, bus_options, json_option
from .output import print_json, print_table, progress, wants_json
from .session import Session, run, session


@click.group()
def dead() -> None:
    """List, show, replay or drop requests that were given up.

    A request is given up and kept when its workers died of it again and again, when it could not be decoded, when
    the engine itself failed on it, or when its model was undeployed with --drop while it waited.
    """


@dead.command("list", cls=SeedCommand)
@click.option("--model", default="", help="Only of this model.")
@bus_options
@json_option
def list_(model: str, address: str, creds: str, as_json: bool) -> None:
    """List the dead letters, oldest first."""
    found = run(_list(address, creds, model))
    if wants_json(as_json):
        print_json([_summary(stored) for stored in found])
    elif not found:
        click.echo("there are no dead letters" + (f" of {model}" if model else ""))
    else:
        rows = [_summary(stored) for stored in found]
        columns = ("number", "id", "model", "reason", "crashes", "at", "detail")
        print_table("dead letters", columns, ([row[column] for column in columns] for row in rows))


async def _list(address: str, creds: str, model: str) -> list[StoredLetter]:
    async with session(address, creds) as now:
        return [stored async for stored in dead_letters.letters(now.bus, model)]


@dead.command(cls=SeedCommand)
@click.argument("which", metavar="ID")
@bus_options
@json_option
def show(which: str, address: str, creds: str, as_json: bool) -> None:
    """Show one dead letter with its request, as JSON. ID: the request's id, or the letter's number."""
    print_json(run(_show(address, creds, which)))


async def _show(address: str, creds: str, which: str) -> dict[str, Any]:
    async with session(address, creds) as now:
        stored = await dead_letters.find_letter(now.bus, which)
        shown = _summary(stored) | {"subject": stored.letter.subject, "tenant": stored.letter.tenant}
        try:
            shown["request"] = msgspec.to_builtins(await dead_letters.request_of(now.bus, stored.letter))
        except ModelBusError as error:
            shown |= {"unreadable": error.message, "original": stored.letter.original.decode(errors="backslashreplace")}
        return shown


@dead.command(cls=SeedCommand)
@click.argument("which", metavar="ID")
@bus_options
@json_option
def replay(which: str, address: str, creds: str, as_json: bool) -> None:
    """Ask the model again and print the answer. ID: the request's id, or the letter's number.

    The request is published anew: with a new id, no crashes counted, 24 hours of time, behind those for whom
    someone waits (lane lo). The answer comes here and nowhere else: whoever asked first has had an error. The letter
    goes when the answer is complete; it stays when there is none, and Ctrl-C takes the new request back.
    """
    result = run(_replay(address, creds, which))
    if wants_json(as_json):
        print_json(result)
    else:
        click.echo("\n".join(result["answers"]) if result["answers"] else f"{result['vectors']} vector(s)")


async def _replay(address: str, creds: str, which: str) -> dict[str, Any]:
    async with session(address, creds) as now:
        stored = await dead_letters.find_letter(now.bus, which)
        call = await dead_letters.replay(now.publisher, stored)
        progress(f"{stored.letter.id or stored.number} is replayed as {call.id}")
        answer = await collect(call)
        await dead_letters.drop(now.bus, stored)
        texts = [choice.text for choice in answer.choices]
        return {"id": call.id, "replays": stored.letter.id, "answers": texts, "vectors": len(answer.vectors)}


@dead.command("drop", cls=SeedCommand)
@click.argument("which", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them, or all of --model.")
@click.option("--model", default="", help="With --all: only of this model.")
@bus_options
@json_option
def drop(which: tuple[str, ...], everything: bool, model: str, address: str, creds: str, as_json: bool) -> None:
    """Throw dead letters away for good. ID: a request's id, or a letter's number."""
    if bool(which) == everything:
        raise click.UsageError("name the letters, or say --all")
    if model and not everything:
        raise click.UsageError("--model goes with --all")
    dropped = run(_drop(address, creds, which, model))
    if wants_json(as_json):
        print_json({"dropped": dropped})
    else:
        click.secho(f"dropped {dropped} dead letter(s)", fg="green")


async def _drop(address: str, creds: str, which: tuple[str, ...], model: str) -> int:
    async with session(address, creds) as now:
        found = await _named(now, which) if which else [s async for s in dead_letters.letters(now.bus, model)]
        for stored in found:
            await dead_letters.drop(now.bus, stored)
        return len(found)


async def _named(now: Session, which: tuple[str, ...]) -> list[StoredLetter]:
    """All are looked for before one is dropped."""
    return [await dead_letters.find_letter(now.bus, name) for name in which]


def _summary(stored: StoredLetter) -> dict[str, Any]:
    letter = stored.letter
    return {
        "number": stored.number,
        "id": letter.id,
        "model": letter.model,
        "reason": letter.reason,
        "detail": letter.detail,
        "crashes": letter.crashes,
        "runs": letter.runs,
        "at": datetime.fromtimestamp(letter.at_ms / 1000).astimezone().isoformat(timespec="seconds"),
    }
