"""The routes with which users of vLLM load and unload adapters; there only with ``--allow-adapter-updates``."""

from __future__ import annotations

import msgspec
from aiohttp import web
from modelbus_broker.adapters import add_adapter, remove_adapter
from modelbus_broker.errors import InvalidRequest

from .bodies import Body
from .gateway import GATEWAY, Gateway


class LoadRequest(msgspec.Struct, kw_only=True):
    lora_name: str  #: ``model:adapter``, or the adapter's name where one model is deployed
    lora_path: str
    load_inplace: bool = False  #: the name may be taken


class UnloadRequest(msgspec.Struct, kw_only=True):
    lora_name: str


_LOAD, _UNLOAD = Body(LoadRequest), Body(UnloadRequest)


async def load_lora_adapter(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    asked = _LOAD.read(await gateway.body(request))
    model, name = _split(gateway, asked.lora_name)
    await add_adapter(gateway.bus, gateway.registry, model, name, asked.lora_path, replace=asked.load_inplace)
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully: its name is '{model}:{name}'.")


async def unload_lora_adapter(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    model, name = _split(gateway, _UNLOAD.read(await gateway.body(request)).lora_name)
    await remove_adapter(gateway.bus, gateway.registry, model, name)
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def _split(gateway: Gateway, lora_name: str) -> tuple[str, str]:
    """The model and the name of the adapter. Raises InvalidRequest where it is not said which model is meant."""
    model, colon, name = gateway.model(lora_name).rpartition(":")
    if colon:
        return model, name
    models = gateway.registry.models()
    if len(models) != 1:
        raise InvalidRequest(
            f"'{lora_name}' does not say which of {len(models)} models it is for: write MODEL:{lora_name}.",
            param="lora_name",
        )
    return models[0], lora_name
