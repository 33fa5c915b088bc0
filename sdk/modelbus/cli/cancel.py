"""cancel: take requests back, whoever asked."""

from __future__ import annotations

import asyncio

import click
import msgspec
from modelbus_broker import cancelling, names
from modelbus_broker.messages import Cancelled

from .main import EXIT_FAILED, EXIT_NOT_FOUND, SeedCommand, bus_options, json_option
from .output import print_json, wants_json
from .session import run, session


@click.command(cls=SeedCommand)
@click.argument("which", metavar="ID...", nargs=-1, required=True)
@bus_options
@json_option
def cancel(which: tuple[str, ...], address: str, creds: str, as_json: bool) -> None:
    """Cancel requests by their ids, whoever asked.

    An id is in the header x-request-id of the gateway's answer, in the body's field id, and in the logs. What runs is
    aborted, what waits leaves its queue, and whoever waits for the answer gets the error request_cancelled. It works
    too when the gateway or the program that asked is gone.

    Exit status: 4 if one of them is not known (it has ended, or never was), 1 if a worker has not yet let go of one.
    """
    for request_id in which:
        try:
            names.publisher_of(request_id)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    found = run(_cancel(address, creds, which))
    if wants_json(as_json):
        print_json([_row(answer) for answer in found])
    else:
        for answer in found:
            click.secho(_words(answer), fg="green" if answer.stopped else "yellow")
    if any(answer.was == "unknown" for answer in found):
        raise SystemExit(EXIT_NOT_FOUND)
    if not all(answer.stopped for answer in found):
        raise SystemExit(EXIT_FAILED)


async def _cancel(address: str, creds: str, which: tuple[str, ...]) -> list[Cancelled]:
    async with session(address, creds) as now:
        return await asyncio.gather(*(cancelling.cancel(now.bus, request_id) for request_id in which))


def _row(answer: Cancelled) -> dict[str, object]:
    return {**msgspec.structs.asdict(answer), "cancelled": answer.was != "unknown"}


def _words(answer: Cancelled) -> str:
    match answer.was:
        case "queued":
            return f"{answer.id}: it was waiting in its queue and is out of it"
        case "unknown":
            return f"{answer.id}: not known: it has ended, or there never was such a request"
    did = "was running on" if answer.was == "running" else "was about to run on"
    then = "and is stopped" if answer.stopped else "and was told to stop; it has not said that it did"
    return f"{answer.id}: it {did} worker {answer.worker} {then}"
