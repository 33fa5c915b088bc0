"""doc: knowledge bases out of folders of documents"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import click
import msgspec
from modelbus_broker.messages import Context
from modelbus_broker.messages.search import StoreStatus

from ..client import Client
from ..deploying import DeployResult, deploy
from ..knowledge.answering import LIMIT
from ..knowledge.base import (
    Asking,
    AsyncKnowledgeBase,
    KnowledgeAnswer,
    KnowledgeStream,
    Looking,
    Recall,
    knowledge_bases,
)
from ..knowledge.building import BuildReport
from ..knowledge.routing import Route
from ..spec import DeploySpec, engine_choice
from .main import EXIT_INCOMPLETE, SeedCommand, bus_options, json_option
from .output import print_json, print_table, progress, wants_json
from .session import run, session
from .storage import client, drop_store, service_option

DEFAULT_COLLECTION = "default"
_RESPONSE, _CONTEXTS = "=============RESPONSE==================", "=============CONTEXTS=================="


@click.group()
def doc() -> None:
    """Build knowledge bases out of folders, and ask them.

    A collection is a store of a search service: `modelbus storage` shows and copies it.
    """


def looking_options(command: Any) -> Any:
    """Where is looked, and how: the options of all that ask."""
    for option in reversed(
        (
            click.option("--emb-model", default="", help="As the collection was built with; it is known there."),
            click.option(
                "--collections", "--collection", "collections", default=DEFAULT_COLLECTION, show_default=True,
                metavar="A,B", help="Where to look.",
            ),
            click.option(
                "--route", type=click.Choice(get_args(Route)), default="auto", show_default=True,
                help="Which of several collections, by their descriptions: auto is embedding where there are more than 3.",
            ),
            click.option(
                "--limit", type=click.IntRange(1, 100), default=LIMIT, show_default=True,
                help="Passages that the model gets.",
            ),
            click.option("--rerank", default="", help="A rerank model that orders what a search finds."),
            click.option(
                "--recall", type=click.Choice(get_args(Recall)), default="search", show_default=True,
                help="What finds passages; model: a model judges each document.",
            ),
            click.option("--recall-model", default="", help="That judges (default: the one that answers)."),
            click.option(
                "--max-tokens", type=click.IntRange(0), default=0, help="Of an answer (default: what the model takes)."
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


class _Ask(msgspec.Struct, frozen=True):
    """Whom a command asks, and how."""

    address: str
    creds: str
    service: str
    model: str
    emb_model: str
    collections: list[str]
    looking: Looking
    max_tokens: int

    @property
    def asking(self) -> Asking:
        fields = {"max_tokens": self.max_tokens} if self.max_tokens else {}
        return cast(Asking, {**self.looking, "fields": fields})

    def base(self, now: Client) -> AsyncKnowledgeBase:
        first, *also = self.collections
        return AsyncKnowledgeBase(
            first, client=now, model=self.model, embedding_model=self.emb_model, also=also, service=self.service
        )


def _ask(
    address: str, creds: str, service: str, model: str, emb_model: str, collections: str, route: Route, limit: int,
    rerank: str, recall: Recall, recall_model: str, max_tokens: int,
) -> _Ask:  # fmt: skip
    named = [name.strip() for name in collections.split(",") if name.strip()]
    if not named:
        raise click.UsageError("--collections names none")
    if "model" in (recall, route) and not (recall_model or model):
        raise click.UsageError("a model that judges is needed: --recall-model, or --model")
    looking: Looking = {
        "limit": limit, "rerank": rerank, "recall": recall, "recall_model": recall_model, "route": route,
    }  # fmt: skip
    return _Ask(address, creds, service, model, emb_model, named, looking, max_tokens)


@doc.command("build", cls=SeedCommand)
@click.option("--source-dir", required=True, type=click.Path(path_type=Path), help="The folder; all below it is read.")
@click.option("--emb-model", required=True, help="The embedding model on the bus.")
@click.option("--model", default="", help="The model that will answer; building needs none.")
@click.option("--collection", default=DEFAULT_COLLECTION, show_default=True)
@click.option(
    "--description", default="", help="What the collection is about; questions are sent to collections by it."
)
@click.option("--required-exts", default="", metavar=".md,.txt", help="Only files with these (default: all texts).")
@click.option("--query-prefix", default="", help='Before questions, for models that want "query: ".')
@click.option("--passage-prefix", default="", help='Before texts, for models that want "passage: ".')
@service_option
@bus_options
@json_option
def build_(
    source_dir: Path, emb_model: str, model: str, collection: str, description: str, required_exts: str,
    query_prefix: str, passage_prefix: str, service: str, address: str, creds: str, as_json: bool,
) -> None:  # fmt: skip
    """Bring a collection up to date with a folder: only what has changed is read and embedded again.

    Files that cannot be read are named at the end, and the exit code is 5 then; all others are in the collection.
    """
    extensions = [f".{part.strip().lstrip('.').lower()}" for part in required_exts.split(",") if part.strip(" .")]
    report = run(
        _build(
            address, creds, source_dir, extensions,
            {
                "name": collection, "service": service, "embedding_model": emb_model, "query_prefix": query_prefix,
                "passage_prefix": passage_prefix, "description": description,
            },
        )
    )  # fmt: skip
    if wants_json(as_json):
        print_json(report)
    else:
        click.secho(
            f"collection {collection}: {report.files} files, {report.written} read, {report.unchanged} unchanged, "
            f"{report.removed} removed; {report.chunks} chunks, {report.embedded} embedded, in {report.seconds:.1f} s",
            fg="green",
        )
    for path, words in sorted(report.failed.items()):
        click.echo(f"not read: {path}: {words}", err=True)
    if report.failed:
        raise click.exceptions.Exit(EXIT_INCOMPLETE)


async def _build(
    address: str, creds: str, folder: Path, extensions: list[str], settings: dict[str, Any]
) -> BuildReport:
    async with client(address, creds) as now:
        with _bar() as progress:
            return await AsyncKnowledgeBase(client=now, **settings).build(
                folder, extensions=extensions, progress=progress
            )


@contextmanager
def _bar() -> Iterator[Any]:
    """A bar on a terminal, on the error output; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("building")

        def progress(report: BuildReport) -> None:
            done = report.unchanged + report.written + len(report.failed)
            shown.update(task, total=report.files, completed=done, description=f"building, {report.chunks} chunks")

        yield progress


@doc.command(cls=SeedCommand)
@click.option("--query", "question", required=True, help="The question.")
@click.option("--model", default="", help="The model that answers.")
@looking_options
@click.option("--contexts-only", is_flag=True, help="Print what was found; no model answers.")
@service_option
@bus_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def query(
    question: str, model: str, contexts_only: bool, as_json: bool, **asking: Any,
) -> None:  # fmt: skip
    """Answer a question from collections, with the sources."""
    if not model and not contexts_only:
        raise click.UsageError("--model names the model that answers; --contexts-only asks none")
    ask = _ask(model=model, **asking)
    if contexts_only:
        found = run(_contexts(ask, question))
        if as_json:
            print_json({"response": "", "contexts": found, "citations": []})
            return
        for context in found:
            click.echo(f"{context.text}\n")
        _show(found)
        return
    answered = run(_query(ask, question, quiet=as_json))
    if as_json:
        cited = [context.number for context in answered.citations]
        print_json({"response": answered.text, "contexts": answered.contexts, "citations": cited})


async def _contexts(ask: _Ask, question: str) -> list[Context]:
    async with client(ask.address, ask.creds) as now:
        return await ask.base(now).contexts(question, **ask.looking)


async def _query(ask: _Ask, question: str, *, quiet: bool) -> KnowledgeAnswer:
    async with client(ask.address, ask.creds) as now:
        return await _say(ask.base(now).stream(question, **ask.asking), quiet=quiet)


async def _say(stream: KnowledgeStream, *, quiet: bool = False) -> KnowledgeAnswer:
    """Prints an answer as it comes, and what it was made of; returns it."""
    async with stream:
        if not quiet:
            click.echo(f"{_RESPONSE}\n\n")
        async for delta in stream:
            if not quiet and delta.text:
                click.echo(delta.text, nl=False)
    if not quiet:
        _show(stream.contexts)
    return stream.answer


def _show(found: Sequence[Context]) -> None:
    click.echo(f"\n\n{_CONTEXTS}")
    for context in found:
        click.echo(f"[{context.number}] {context.place}")


@doc.command(cls=SeedCommand)
@click.option("--model", required=True, help="The model that answers.")
@looking_options
@service_option
@bus_options
def chat(**asking: Any) -> None:
    """Talk with collections: each line is a question and may refer to what was said. An empty line ends it."""
    run(_chat(_ask(**asking)))


async def _chat(ask: _Ask) -> None:
    async with client(ask.address, ask.creds) as now:
        base = ask.base(now)
        for store in base.stores:
            await store.status()  # one that is not there is said before anything is asked
        talk = base.chat(**ask.asking)
        while question := await _line():
            talk.heard(question, await _say(talk.stream(question)))


async def _line() -> str:
    if sys.stdin.isatty():
        click.echo("\n> ", nl=False)
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


@doc.command(cls=SeedCommand)
@click.option("--name", required=True, help="Of the model that clients address.")
@click.option("--model", required=True, help="The model on the bus that answers.")
@looking_options
@click.option("--system", default="", help="More instructions for the model that answers.")
@click.option("--num-workers", type=int, default=1, show_default=True)
@click.option("--worker-concurrency", type=int, default=0, help="Questions at once per worker; 0: 32.")
@click.option(
    "--client-creds",
    default="",
    metavar="PATH",
    help="On a node that is not the head's: a client's credential file there, with which the worker asks.",
)
@click.option("--timeout-s", type=float, default=120.0, show_default=True, help="For coming up.")
@service_option
@bus_options
@json_option
def serve(
    name: str, system: str, num_workers: int, worker_concurrency: int, client_creds: str, timeout_s: float,
    as_json: bool, **asking: Any,
) -> None:  # fmt: skip
    """Serve collections as a model: any client and any gateway asks it like one; `modelbus undeploy NAME` ends it.

    An answer has its sources in the field `grounding`.
    """
    ask = _ask(**asking)
    params = {
        "model": ask.model, "collections": ",".join(ask.collections), "service": ask.service, "system": system,
        "creds": client_creds, "emb_model": ask.emb_model, "max_tokens": str(ask.max_tokens or ""), **{key: str(value) for key, value in ask.looking.items()},
    }  # fmt: skip
    spec = DeploySpec(
        model=name, pretrained_model_type="knowledge", num_workers=num_workers, worker_concurrency=worker_concurrency,
        infer_params={key: value for key, value in params.items() if value}, timeout_s=timeout_s,
    )  # fmt: skip
    engine_choice(spec)
    result = run(_serve(ask, spec))
    if wants_json(as_json):
        print_json(result)
    else:
        click.secho(f"model {name} answers from {', '.join(ask.collections)}, in {result.took_s:.1f} s", fg="green")


async def _serve(ask: _Ask, spec: DeploySpec) -> DeployResult:
    async with session(ask.address, ask.creds, declare=True) as now:
        return await deploy(now.bus, now.registry, now.publisher, spec, progress)


@doc.command("list", cls=SeedCommand)
@service_option
@bus_options
@json_option
def list_(service: str, address: str, creds: str, as_json: bool) -> None:
    """Show the collections of a search service."""
    found = [
        {
            "collection": store.record.name, "files": store.files, "chunks": store.chunks,
            "embedding_model": store.record.embedding_model, "source_dir": store.record.metadata.get("source_dir", ""),
            "description": store.record.metadata.get("description", ""),
        }
        for store in run(_list(address, creds, service))
    ]  # fmt: skip
    if wants_json(as_json):
        print_json(found)
    else:
        columns = ("collection", "files", "chunks", "embedding_model", "source_dir", "description")
        print_table("collections", columns, ([one[column] for column in columns] for one in found))


async def _list(address: str, creds: str, service: str) -> list[StoreStatus]:
    async with client(address, creds) as now:
        return await knowledge_bases(now, service=service)


@doc.command(cls=SeedCommand)
@click.argument("collection")
@click.option("--yes", is_flag=True, help="Do not ask.")
@service_option
@bus_options
@json_option
def drop(collection: str, yes: bool, service: str, address: str, creds: str, as_json: bool) -> None:
    """Delete a collection; the documents stay where they are."""
    drop_store(collection, "collection", yes, service, address, creds, as_json)
