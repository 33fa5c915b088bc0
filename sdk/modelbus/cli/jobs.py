"""jobs: what was asked durably, and what became of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
import msgspec
from modelbus_broker.errors import ModelBusError
from modelbus_broker.jobs import ENDED, Jobs, JobStatus, check_id

from ..answer_types import answer_of
from .main import EXIT_FAILED, SeedCommand, bus_options, json_option
from .output import print_json, print_table, wants_json
from .session import run, session


@click.group()
def jobs() -> None:
    """List, show or cancel jobs: requests that outlive whoever asked.

    Programs submit them (`client.submit`, `batch`, `map`); their answers are kept for 24 hours if nothing else was said.
    """


@jobs.command("list", cls=SeedCommand)
@click.option("--model", default="", help="Only of this model.")
@click.option("--batch", default=None, help="Only the rows of this batch.")
@click.option("--limit", default=50, show_default=True, help="At most so many.")
@bus_options
@json_option
def list_(model: str, batch: str | None, limit: int, address: str, creds: str, as_json: bool) -> None:
    """List jobs, the newest first."""
    found = run(_list(address, creds, model, batch, limit))
    if wants_json(as_json):
        print_json([_row(status) for status in found])
    elif not found:
        click.echo("there are no jobs" + (f" of {model}" if model else ""))
    else:
        columns = ("id", "state", "model", "lane", "name", "batch", "index", "submitted", "ended", "error")
        rows = [_row(status) for status in found]
        print_table("jobs", columns, ([row[column] for column in columns] for row in rows))


async def _list(address: str, creds: str, model: str, batch: str | None, limit: int) -> list[JobStatus]:
    async with session(address, creds) as now:
        return await Jobs(now.publisher).find(model=model, batch=batch, limit=limit)


@jobs.command(cls=SeedCommand)
@click.argument("job_id", metavar="ID")
@bus_options
@json_option
def show(job_id: str, address: str, creds: str, as_json: bool) -> None:
    """Show how one job is, and its answer if it has one."""
    _check(job_id)
    status, answer = run(_show(address, creds, job_id))
    if wants_json(as_json):
        print_json(_row(status) | {"answer": answer})
        return
    for key, value in _row(status).items():
        if value not in ("", {}):
            click.echo(f"{key:<10} {value}")
    if answer is not None:
        click.echo(f"\n{answer['choices'][0]['text'] if answer['choices'] else ''}")


async def _show(address: str, creds: str, job_id: str) -> tuple[JobStatus, dict[str, Any] | None]:
    async with session(address, creds) as now:
        found = Jobs(now.publisher)
        status = await found.status(job_id)
        if status.state != "done":
            return status, None
        answer = answer_of(await found.ended(job_id))
        return status, msgspec.to_builtins(answer)


@jobs.command(cls=SeedCommand)
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@bus_options
@json_option
def cancel(job_ids: tuple[str, ...], address: str, creds: str, as_json: bool) -> None:
    """Take jobs back. One that has ended stays as it is.

    Exit status: 1 if one of them had ended before, 4 if there is no such job.
    """
    for job_id in job_ids:
        _check(job_id)
    found = run(_cancel(address, creds, job_ids))
    if wants_json(as_json):
        print_json([_row(status) for status in found])
    else:
        for status in found:
            said = "is cancelled" if status.state == "cancelled" else f"had ended before: {status.state}"
            click.secho(f"{status.id}: {said}", fg="green" if status.state == "cancelled" else "yellow")
    if any(status.state != "cancelled" for status in found):
        raise SystemExit(EXIT_FAILED)


async def _cancel(address: str, creds: str, job_ids: tuple[str, ...]) -> list[JobStatus]:
    async with session(address, creds) as now:
        found = Jobs(now.publisher)
        return [await found.cancel(job_id) for job_id in job_ids]


def _check(job_id: str) -> None:
    try:
        check_id(job_id)
    except ModelBusError as error:
        raise click.UsageError(error.message) from error


def _row(status: JobStatus) -> dict[str, Any]:
    return {
        "id": status.id,
        "state": status.state,
        "model": status.model,
        "lane": status.lane,
        "name": status.name,
        "batch": status.batch,
        "index": status.index if status.batch else "",
        "submitted": _at(status.submitted_ms),
        "ended": _at(status.ended_ms) if status.state in ENDED else "",
        "kept_s": status.kept_s,
        "labels": status.labels,
        "error": f"{status.code}: {status.message}" if status.code else "",
    }


def _at(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000).isoformat(sep=" ", timespec="seconds") if unix_ms else ""
