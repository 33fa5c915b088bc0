"""deploy, undeploy, models, stat, logs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import click
import msgspec
from modelbus_broker.connection import Msg
from modelbus_broker.errors import ModelNotFound, NotFound

from .. import deploying
from ..spec import DeploySpec, engine_choice, parse_params
from ..stat import ModelInfo, model_info, stat_of
from .main import SeedCommand, bus_options, json_option
from .output import print_json, print_table, progress, wants_json
from .session import Session, run, session

#: How long nodes have to answer a question for their logs, seconds.
LOGS_WAIT_S = 1.0


@click.command(cls=SeedCommand)
@click.option("--model", required=True, help="The name that clients address.")
@click.option("--pretrained-model-type", default="custom/auto", show_default=True,
              help="saas/NAME for a provider, custom/auto for weights on disk, or an engine's name (echo).")  # fmt: skip
@click.option("--infer-backend", default="", help="For custom/...: transformers (default), vllm, llama_cpp.")
@click.option("--model-path", default="", help="The weights, as the nodes see them.")
@click.option("--infer-params", multiple=True, metavar="K=V ...",
              help="saas.* and backend.* for the engine; secrets may be env:NAME or file:PATH, read on the node.")  # fmt: skip
@click.option("--num-workers", type=int, default=1, show_default=True)
@click.option("--worker-concurrency", type=int, default=0, help="Requests at once per worker; 0 = the engine's number.")
@click.option("--cpus-per-worker", type=float, default=0.01, show_default=True)
@click.option("--gpus-per-worker", type=float, default=0.0, show_default=True)
@click.option("--memory-mb", type=int, default=0, help="Per worker, MiB.")
@click.option("--require", multiple=True, metavar="K=V ...", help="Only on nodes with these labels.")
@click.option("--name", default="", help="Of this deployment; several may serve one model (default: the model).")
@click.option("--queue-limit", type=int, default=10_000, show_default=True, help="Requests that may wait.")
@click.option("--shares", type=int, default=1, show_default=True, help="Fair shares of the queue among tenants.")
@click.option("--priority", type=int, default=0, show_default=True, help="0 is served first, 9 last.")
@click.option("--budget-s", type=float, default=600.0, show_default=True, help="Of a request that names no time.")
@click.option("--timeout-s", type=float, default=600.0, show_default=True, help="For coming up.")
@click.option("--drain-s", type=float, default=25.0, show_default=True,
              help="A worker that is stopped finishes what it can for so long, then hands over.")  # fmt: skip
@click.option("--engine-stall-s", type=float, default=60.0, show_default=True,
              help="A worker whose engine makes no step for so long while requests run ends, and another is started; "
              "reading a prompt may take five times as long; 0 = never.")  # fmt: skip
@click.option("--orphan-grace-s", type=float, default=30.0, show_default=True,
              help="A stream runs on for so long when its gateway is gone; a plain request for 3 s.")  # fmt: skip
@bus_options
@json_option
def deploy(address: str, creds: str, as_json: bool, **given: Any) -> None:
    """Bring a model up; returns when it can answer, or says why it cannot."""
    spec = DeploySpec(
        **given | {"infer_params": parse_params(given["infer_params"]), "require": parse_params(given["require"])}
    )
    engine_choice(spec)  # what cannot be meant is refused before anything is connected
    result = run(_deploy(address, creds, spec))
    if wants_json(as_json):
        print_json(result)
    else:
        verb = "replaced" if result.replaced else "deployed"
        where = ", ".join(result.nodes)
        click.secho(
            f"{verb} {result.model}: {result.workers} worker(s) on {where} in {result.took_s:.1f} s", fg="green"
        )


async def _deploy(address: str, creds: str, spec: DeploySpec) -> deploying.DeployResult:
    async with session(address, creds, declare=True) as now:
        return await deploying.deploy(now.bus, now.registry, now.publisher, spec, progress)


@click.command(cls=SeedCommand)
@click.option("--model", required=True)
@click.option("--drain", is_flag=True, help="Take no new requests and serve what waits first.")
@click.option("--drop", is_flag=True, help="Move what waits to the dead letters.")
@click.option("--force", is_flag=True, help="The same as --drop.")
@click.option("--timeout-s", type=float, default=600.0, show_default=True, help="For draining.")
@bus_options
@json_option
def undeploy(
    model: str, drain: bool, drop: bool, force: bool, timeout_s: float, address: str, creds: str, as_json: bool
) -> None:
    """Take a model down; refuses while requests wait, unless told what to do with them."""
    if drain and (drop or force):
        raise click.UsageError("--drain and --drop exclude each other")
    result = run(_undeploy(address, creds, model, drain, drop or force, timeout_s))
    if wants_json(as_json):
        print_json(result)
    else:
        dropped = f"; {result.dropped} waiting request(s) lie with the dead letters" if result.dropped else ""
        click.secho(f"undeployed {model}{dropped}", fg="green")


async def _undeploy(
    address: str, creds: str, model: str, drain: bool, drop: bool, timeout_s: float
) -> deploying.UndeployResult:
    async with session(address, creds) as now:
        return await deploying.undeploy(
            now.bus, now.registry, model, drain=drain, drop=drop, timeout_s=timeout_s, on_progress=progress
        )


@click.command(cls=SeedCommand)
@bus_options
@json_option
def models(address: str, creds: str, as_json: bool) -> None:
    """List what is deployed."""
    run(_show(address, creds, "", as_json))


@click.command(cls=SeedCommand)
@click.option("--model", default="", help="Only this one, as JSON.")
@click.option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C.")
@click.option("--interval", type=float, default=0.0, help="Again every so many seconds, until Ctrl-C.")
@bus_options
@json_option
def stat(model: str, watch: bool, interval: float, address: str, creds: str, as_json: bool) -> None:
    """Show how busy a model is, or all of them."""
    run(_show(address, creds, model, as_json, interval or (2.0 if watch else 0.0)))


async def _show(address: str, creds: str, model: str, as_json: bool, interval_s: float = 0.0) -> None:
    async with session(address, creds) as now:
        while True:
            if model:
                print_json(stat_of(now.registry, model))
            else:
                _print_models(await _infos(now), as_json)
            if not interval_s:
                return
            await asyncio.sleep(interval_s)
            if not wants_json(as_json):
                click.clear()


async def _infos(now: Session) -> list[ModelInfo]:
    from modelbus_broker.standstill import standing_models
    from modelbus_broker.topology import queued

    registry = now.registry
    waiting = {name: await queued(now.bus, name) for name in registry.models()}
    stuck = await standing_models(now.bus, registry, [name for name, count in waiting.items() if count])
    return [
        model_info(
            name, registry.deployments_of(name), registry.workers_of(name, ""), queued=count, stuck=name in stuck
        )
        for name, count in waiting.items()
    ]


def _print_models(infos: list[ModelInfo], as_json: bool) -> None:
    if wants_json(as_json):
        print_json(infos)
        return
    if not infos:
        click.echo("no model is deployed; `modelbus deploy --help` says how to")
        return
    print_table(
        "models",
        ("model", "engine", "workers", "busy", "queued", "requests", "tasks", "context"),
        (
            (
                info.model, info.engine, f"{info.workers} of {info.wanted}", f"{info.busy} of {info.slots}",
                f"{info.queued} STUCK" if info.stuck else info.queued,
                info.total_requests, ", ".join(info.tasks), info.context_length or "?",
            )
            for info in infos
        ),
    )  # fmt: skip


@click.command(cls=SeedCommand)
@click.argument("model")
@click.option("-n", "--lines", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Per worker.")
@bus_options
@json_option
def logs(model: str, lines: int, address: str, creds: str, as_json: bool) -> None:
    """Show the last lines that a model's workers have logged, from all hosts."""
    answers = run(_logs(address, creds, model, lines))
    if wants_json(as_json):
        print_json(answers)
        return
    for answer in answers:
        for worker in answer["workers"]:
            click.secho(f"--- {worker['deployment']}.{worker['replica']} on {answer['host']}", bold=True)
            click.echo("\n".join(worker["lines"]))


async def _logs(address: str, creds: str, model: str, lines: int) -> list[dict[str, Any]]:
    async with session(address, creds) as now:
        answers: list[dict[str, Any]] = []

        def take(msg: Msg) -> None:
            with contextlib.suppress(msgspec.MsgspecError):
                answers.append(msgspec.json.decode(msg.data))

        inbox = now.bus.new_inbox()
        await now.bus.subscribe(inbox, take)
        await now.bus.publish("mb.logs", msgspec.json.encode({"model": model, "lines": lines}), reply=inbox)
        end = time.monotonic() + LOGS_WAIT_S
        while time.monotonic() < end and len(answers) < len(now.registry.nodes):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        answers = [answer for answer in answers if answer.get("workers")]
        if not answers:
            if model not in now.registry.models():
                raise ModelNotFound(f"model {model!r} is not deployed; `modelbus models` lists those that are")
            raise NotFound(f"no node has logs of {model!r}")
        return sorted(answers, key=lambda answer: str(answer.get("host")))
