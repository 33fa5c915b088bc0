"""storage: search services and their stores"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from modelbus_broker.errors import ConfigurationError, EngineFailed, ModelUnavailable
from modelbus_broker.messages import StartFailure, WorkerRecord
from modelbus_broker.messages.search import SEARCH_ENGINE, StoreStatus
from modelbus_broker.settings import home

from .. import deploying
from ..client import Client
from ..search.asking import DEFAULT_SERVICE, list_stores
from ..search.copies import export_store, restore_store
from ..search.store import AsyncStore
from ..spec import DeploySpec, engine_choice, parse_params
from .main import SeedCommand, bus_options, json_option
from .output import print_json, print_table, progress, wants_json
from .session import run, session


@click.group()
def storage() -> None:
    """Start and stop a search service; show, copy and drop its stores.

    A search service keeps texts and vectors and finds them by words, by meaning and by both: in a folder of this host, or on
    Elasticsearch.
    """


def service_option(command: Any) -> Any:
    return click.option("--service", default=DEFAULT_SERVICE, show_default=True, help="Of the search service.")(command)


@storage.command(cls=SeedCommand)
@service_option
@click.option("--engine", type=click.Choice(["embedded", "elasticsearch"]), default="embedded", show_default=True)
@click.option("--folder", default="", help="Of an embedded service's stores (default: under MODELBUS_HOME).")
@click.option("--url", default="", help="Of Elasticsearch, http://HOST:9200.")
@click.option("--infer-params", multiple=True, metavar="K=V ...",
              help="More for the engine: api_key, user, password, prefix, ...; secrets may be env:NAME or file:PATH.")  # fmt: skip
@click.option("--num-workers", type=int, default=1, show_default=True, help="An embedded service has one.")
@click.option(
    "--worker-concurrency", type=int, default=0, help="Operations at once per worker; 0 = the engine's number."
)
@click.option("--timeout-s", type=float, default=60.0, show_default=True, help="For coming up.")
@bus_options
@json_option
def start(
    service: str, engine: str, folder: str, url: str, infer_params: tuple[str, ...], num_workers: int,
    worker_concurrency: int, timeout_s: float, address: str, creds: str, as_json: bool,
) -> None:  # fmt: skip
    """Start a search service, or change a running one; its stores stay."""
    params = parse_params(infer_params) | {"engine": engine} | ({"url": url} if url else {})
    spec = DeploySpec(
        model=service, pretrained_model_type=SEARCH_ENGINE, infer_params=params, num_workers=num_workers,
        worker_concurrency=worker_concurrency, timeout_s=timeout_s, budget_s=60.0, drain_s=10.0,
        **(_embedded(service, folder, params, num_workers) if engine == "embedded" else _elastic(folder, params)),
    )  # fmt: skip
    engine_choice(spec)
    result = run(_start(address, creds, spec))
    if wants_json(as_json):
        print_json(result)
    else:
        where = spec.model_path or ", ".join(result.nodes)
        verb = "changed" if result.replaced else "started"
        click.secho(f"{verb} search service {service}: {engine}, {where}, in {result.took_s:.1f} s", fg="green")


def _embedded(service: str, folder: str, params: Mapping[str, str], num_workers: int) -> dict[str, Any]:
    """Where its one worker may run."""
    if "url" in params:
        raise click.UsageError("--url belongs to --engine elasticsearch")
    if num_workers != 1:
        raise click.UsageError(
            "an embedded service has one worker: it owns the folder. --engine elasticsearch has many"
        )
    path = Path(folder).expanduser().resolve() if folder else home() / "storage" / service
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"the folder {path} cannot be made: {error.strerror}") from error
    # Another host would begin with an empty folder of that name.
    return {"model_path": str(path), "exclusive": True, "require": {"host": socket.gethostname()}}


def _elastic(folder: str, params: Mapping[str, str]) -> dict[str, Any]:
    """Its workers may run anywhere."""
    if folder:
        raise click.UsageError("--folder belongs to --engine embedded")
    if "url" not in params:
        raise click.UsageError("--engine elasticsearch needs --url http://HOST:9200")
    return {}


async def _start(address: str, creds: str, spec: DeploySpec) -> deploying.DeployResult:
    async with session(address, creds, declare=True) as now:
        return await deploying.deploy(now.bus, now.registry, now.publisher, spec, progress)


@storage.command(cls=SeedCommand)
@service_option
@click.option("--drop", is_flag=True, help="Move operations that wait to the dead letters; else they are done first.")
@bus_options
@json_option
def stop(service: str, drop: bool, address: str, creds: str, as_json: bool) -> None:
    """Stop a search service; its stores stay where they are."""
    result = run(_stop(address, creds, service, drop))
    if wants_json(as_json):
        print_json(result)
    else:
        click.secho(f"stopped search service {service}; its stores are kept", fg="green")


async def _stop(address: str, creds: str, service: str, drop: bool) -> deploying.UndeployResult:
    async with session(address, creds) as now:
        return await deploying.undeploy(now.bus, now.registry, service, drain=not drop, drop=drop, on_progress=progress)


@storage.command(cls=SeedCommand)
@service_option
@bus_options
@json_option
def status(service: str, address: str, creds: str, as_json: bool) -> None:
    """Show a service's workers and its stores; where no worker runs, why."""
    run(_status(address, creds, service, as_json))


async def _status(address: str, creds: str, service: str, as_json: bool) -> None:
    async with client(address, creds) as now:
        workers = now.registry.workers_of(service, state="")
        revisions = {deployment.revision for deployment in now.registry.deployments_of(service)}
        failures = [failure for failure in now.registry.failures.values() if failure.revision in revisions]
        # Without a worker the question would wait.
        down = bool(revisions) and not now.registry.is_served(service)
        stores = [] if down else await list_stores(now, service=service)
    if wants_json(as_json):
        print_json({"service": service, "workers": workers, "failures": failures, "stores": stores})
    else:
        _print_status(service, workers, failures, stores)
    if down:
        if not failures:
            raise ModelUnavailable(f"no worker of search service {service!r} is ready yet; operations wait meanwhile")
        again = any(failure.again_ms for failure in failures)
        raise ModelUnavailable(
            f"search service {service!r} cannot start: {failures[0].words}"
            + ("; it is tried again, and operations wait meanwhile" if again else "")
        )


def _print_status(
    service: str, workers: Sequence[WorkerRecord], failures: Sequence[StartFailure], stores: Sequence[StoreStatus]
) -> None:
    print_table(
        f"workers of {service}", ("replica", "state", "host", "pid", "busy", "operations", "says"),
        ((w.replica, w.state, w.host, w.pid, f"{w.busy}/{w.slots}", w.total_requests, w.words) for w in workers),
    )  # fmt: skip
    if failures:
        print_table(
            "could not start", ("replica", "node", "tried again", "why"),
            ((f.replica, f.node, "yes" if f.again_ms else "no", f.words) for f in failures),
        )  # fmt: skip
    print_table(
        "stores", ("store", "engine", "chunks", "vectors", "files", "dimensions", "embedding model", "MiB"),
        (
            (
                s.record.name, s.engine, s.chunks, s.vectors, s.files, s.record.dimensions or "",
                s.record.embedding_model, f"{s.bytes / (1 << 20):.1f}",
            )
            for s in stores
        ),
    )  # fmt: skip
    if damaged := [(s.record.name, s.record.metadata["error"]) for s in stores if "error" in s.record.metadata]:
        print_table("cannot be read", ("store", "why"), damaged)


@storage.command(cls=SeedCommand)
@click.argument("store")
@click.option(
    "--file", "file", required=True, type=click.Path(dir_okay=False, path_type=Path), help="To write, JSON lines."
)
@service_option
@bus_options
@json_option
def export(store: str, file: Path, service: str, address: str, creds: str, as_json: bool) -> None:
    """Write a store with its vectors to a file."""
    count = run(_export(address, creds, store, file, service))
    _say(as_json, {"store": store, "file": str(file), "chunks": count}, f"exported {count} chunks of {store} to {file}")


async def _export(address: str, creds: str, store: str, file: Path, service: str) -> int:
    async with client(address, creds) as now:
        return await export_store(now, store, file, service=service, counted=_counted)


@storage.command(cls=SeedCommand)
@click.option("--file", "file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--store", default="", help="Its name (default: the one in the file).")
@click.option("--replace", is_flag=True, help="Write over the chunks of a store that is there.")
@service_option
@bus_options
@json_option
def restore(file: Path, store: str, replace: bool, service: str, address: str, creds: str, as_json: bool) -> None:
    """Make a store from an exported file; nothing is embedded anew."""
    name, count = run(_restore(address, creds, file, store, replace, service))
    _say(as_json, {"store": name, "file": str(file), "chunks": count}, f"restored {name}: {count} chunks")


async def _restore(
    address: str, creds: str, file: Path, store: str, replace: bool, service: str
) -> tuple[str, int]:  # fmt: skip
    async with client(address, creds) as now:
        restored = await restore_store(now, file, store, service=service, replace=replace, counted=_counted)
        return restored.name, (await restored.status()).chunks


@storage.command(cls=SeedCommand)
@click.argument("store")
@click.option("--yes", is_flag=True, help="Do not ask.")
@service_option
@bus_options
@json_option
def drop(store: str, yes: bool, service: str, address: str, creds: str, as_json: bool) -> None:
    """Delete a store with all that is in it."""
    drop_store(store, "store", yes, service, address, creds, as_json)


def drop_store(store: str, kind: str, yes: bool, service: str, address: str, creds: str, as_json: bool) -> None:
    """Deletes a store, which the user knows as a thing of this kind, after asking."""
    if not yes:
        click.confirm(f"delete {kind} {store} and all that is in it?", abort=True, err=True)
    count = run(_drop(address, creds, store, service))
    _say(as_json, {kind: store, "chunks": count}, f"dropped {store}: {count} chunks")


async def _drop(address: str, creds: str, store: str, service: str) -> int:
    async with client(address, creds) as now:
        dropped = AsyncStore(store, client=now, service=service)
        try:
            await dropped.status()  # one that is not there is an error here
        except EngineFailed as error:  # a damaged one can be dropped all the same
            click.echo(f"{store} cannot be read: {error.message}", err=True)
        return await dropped.drop()


@asynccontextmanager
async def client(address: str, creds: str) -> AsyncIterator[Client]:
    """A client for the time of one command."""
    async with session(address, creds) as now:
        yield Client(now.bus, now.registry, now.publisher)


def _say(as_json: bool, result: dict[str, Any], words: str) -> None:
    if wants_json(as_json):
        print_json(result)
    else:
        click.secho(words, fg="green")


def _counted(count: int) -> None:
    if count % 10_000 == 0:
        progress(f"{count} chunks")
