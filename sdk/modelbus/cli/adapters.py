"""adapters: LoRA weights that are laid over a model, by name, while it runs."""

from __future__ import annotations

from datetime import datetime

import click
from modelbus_broker.adapters import add_adapter, remove_adapter
from modelbus_broker.errors import ModelNotFound
from modelbus_broker.messages import AdapterRecord

from .main import SeedCommand, bus_options, json_option
from .output import print_json, print_table, wants_json
from .session import run, session


@click.group()
def adapters() -> None:
    """Add, list or remove the LoRA adapters of models.

    Clients ask for one by MODEL:NAME, wherever they name a model. Nothing is restarted.
    """


@adapters.command("add", cls=SeedCommand)
@click.argument("model")
@click.argument("name")
@click.argument("path")
@click.option("--replace", is_flag=True, help="The name may be taken; what runs keeps what it began with.")
@bus_options
@json_option
def add(model: str, name: str, path: str, replace: bool, address: str, creds: str, as_json: bool) -> None:
    """Make the adapter in the folder PATH known as MODEL:NAME.

    PATH is a folder on the hosts of the model's workers, with adapter_config.json and adapter_model.safetensors. All
    ready workers read it before the name is there; what one lacks is said with its host.
    """
    record = run(_add(address, creds, model, name, path, replace))
    if wants_json(as_json):
        print_json(record)
    else:
        click.secho(f"{model}:{name} can be asked for (fingerprint {record.fingerprint})", fg="green")


async def _add(address: str, creds: str, model: str, name: str, path: str, replace: bool) -> AdapterRecord:
    async with session(address, creds, declare=True) as now:
        return await add_adapter(now.bus, now.registry, model, name, path, replace=replace)


@adapters.command("list", cls=SeedCommand)
@click.argument("model", required=False, default="")
@bus_options
@json_option
def list_(model: str, address: str, creds: str, as_json: bool) -> None:
    """List the adapters of all models, or of one."""
    found = run(_list(address, creds, model))
    if wants_json(as_json):
        print_json(found)
    elif not found:
        click.echo("there are no adapters" + (f" of {model}" if model else ""))
    else:
        print_table(
            "adapters",
            ("name", "path", "fingerprint", "added"),
            ((f"{item.model}:{item.name}", item.path, item.fingerprint, _when(item)) for item in found),
        )


async def _list(address: str, creds: str, model: str) -> list[AdapterRecord]:
    async with session(address, creds) as now:
        if model and model not in now.registry.models():
            raise ModelNotFound(f"model {model!r} is not deployed; `modelbus models` lists those that are")
        models = [model] if model else now.registry.models()
        return [record for name in models for record in now.registry.adapters_of(name).values()]


@adapters.command("remove", cls=SeedCommand)
@click.argument("model")
@click.argument("name")
@bus_options
@json_option
def remove(model: str, name: str, address: str, creds: str, as_json: bool) -> None:
    """Take the name MODEL:NAME away; what runs with the adapter ends with it. No file is touched."""
    run(_remove(address, creds, model, name))
    if wants_json(as_json):
        print_json({"removed": f"{model}:{name}"})
    else:
        click.secho(f"removed {model}:{name}", fg="green")


async def _remove(address: str, creds: str, model: str, name: str) -> None:
    async with session(address, creds) as now:
        await remove_adapter(now.bus, now.registry, model, name)


def _when(record: AdapterRecord) -> str:
    return datetime.fromtimestamp(record.created_ms / 1000).astimezone().isoformat(timespec="seconds")
