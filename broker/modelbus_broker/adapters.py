"""Adapters by name: ``model:adapter`` asks a model with other weights laid over its own (LoRA).

A record per adapter lies in a bucket, so adapters are added and removed while the model runs. Its fingerprint comes from
the workers, who read the files: whatever answers under the name, now or after a failure, does so with these weights.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import NamedTuple

import msgspec

from . import names
from .buckets import Bucket
from .connection import Bus, NoResponders
from .errors import AuthenticationFailed, Conflict, InvalidRequest, ModelNotFound, ModelUnavailable, UnsupportedField
from .messages import (
    Adapter,
    AdapterChecked,
    AdapterRecord,
    CheckAdapter,
    WorkerRecord,
    decode_adapter_checked,
    encode,
)
from .registry import Registry
from .topology import may_declare

#: Workers read the whole of an adapter's files before they answer.
CHECK_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Target(NamedTuple):
    """What a name that a client gave means."""

    model: str  #: perhaps not deployed
    record: AdapterRecord | None = None

    @property
    def adapter(self) -> Adapter | None:
        """As a request names it."""
        if self.record is None:
            return None
        return Adapter(name=self.record.name, path=self.record.path, fingerprint=self.record.fingerprint)


def resolve(registry: Registry, name: str) -> Target:
    """The model, and the adapter if the name has one. A model that is deployed under the whole name comes first.

    Raises:
        ModelNotFound: the model is deployed and has no such adapter; the message names those that it has.
    """
    if registry.deployments_of(name):
        return Target(name)
    model, colon, adapter = name.rpartition(":")
    if not colon or not registry.deployments_of(model):
        return Target(name)
    known = registry.adapters_of(model)
    if adapter not in known:
        raise ModelNotFound(
            f"the model {model!r} has no adapter {adapter!r} (it has: {', '.join(known) or 'none'})", param="model"
        )
    return Target(model, known[adapter])


async def add_adapter(
    bus: Bus, registry: Registry, model: str, name: str, path: str, *, replace: bool = False
) -> AdapterRecord:
    """Makes an adapter known under ``model:name`` when all ready workers of the model have read it.

    Args:
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` on the hosts of the workers.
        replace: the name may be taken; requests that run keep what they began with.

    Raises:
        InvalidRequest: the name or the path cannot be meant; the message says which host lacks what.
        ModelNotFound: the model is not deployed.
        ModelUnavailable: none of its workers is ready, or one does not answer.
        UnsupportedField: its workers take no adapters.
        Conflict: it has an adapter of this name.
        AuthenticationFailed: our credential is not the admin's.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is no name for an adapter: letters, digits, '.', '_' and '-' make one", param="name"
        )
    if not path:
        raise InvalidRequest("an adapter needs the path of its folder on the hosts of the workers", param="path")
    _check_may_write(bus)
    await registry.refresh()
    _check_deployed(registry, model)
    if name in registry.adapters_of(model) and not replace:
        raise Conflict(f"the model {model!r} has an adapter {name!r}: remove it first, or say that it is replaced")
    fingerprint = await _checked(bus, model, registry.workers_of(model), Adapter(name=name, path=path))
    record = AdapterRecord(
        model=model, name=name, path=path, fingerprint=fingerprint, created_ms=time.time_ns() // 1_000_000
    )
    bucket, key = Bucket(bus, names.BUCKET_ADAPTERS), names.adapter_key(model, name)
    if replace:
        await bucket.put(key, encode(record))
    else:
        await bucket.create(key, encode(record))
    await registry.refresh()
    return record


async def remove_adapter(bus: Bus, registry: Registry, model: str, name: str) -> None:
    """Takes an adapter's name away; requests that run with it end with it.

    Raises:
        ModelNotFound: the model is not deployed, or has no such adapter.
        AuthenticationFailed: our credential is not the admin's.
    """
    _check_may_write(bus)
    await registry.refresh()
    _check_deployed(registry, model)
    resolve(registry, f"{model}:{name}")
    await Bucket(bus, names.BUCKET_ADAPTERS).delete(names.adapter_key(model, name))
    await registry.refresh()


async def forget_adapters(bus: Bus, model: str) -> None:
    """Removes all of a model that is taken down."""
    bucket, prefix = Bucket(bus, names.BUCKET_ADAPTERS), names.adapter_key(model, "").partition(".")[0] + "."
    for key, entry in (await bucket.all()).items():
        if key.startswith(prefix) and not entry.deleted:
            await bucket.delete(key)


def _check_may_write(bus: Bus) -> None:
    if not may_declare(bus.settings):
        raise AuthenticationFailed(
            "adapters are added and removed with the admin's credential file; this one is not it"
        )


def _check_deployed(registry: Registry, model: str) -> None:
    if not registry.deployments_of(model):
        raise ModelNotFound(f"the model {model!r} is not deployed", param="model")


async def _checked(bus: Bus, model: str, workers: list[WorkerRecord], adapter: Adapter) -> str:
    """The fingerprint that all workers found."""
    if not workers:
        raise ModelUnavailable(f"no worker of {model!r} is ready, and its workers are who reads an adapter")
    unable = sorted(
        {f"{worker.deployment} ({worker.engine})" for worker in workers if not worker.capabilities.adapters}
    )
    if unable:
        raise UnsupportedField(f"the model {model!r} takes no adapters: {', '.join(unable)}", param="model")
    found = await asyncio.gather(*(_ask(bus, worker, adapter) for worker in workers))
    # Several workers of a host say the same.
    wrong = sorted({answer.words for answer in found if answer.words})
    if wrong:
        raise InvalidRequest("; ".join(wrong), param="path")
    prints = {answer.fingerprint for answer in found}
    if len(prints) > 1:
        hosts = ", ".join(sorted({f"{answer.host}: {answer.fingerprint}" for answer in found}))
        raise InvalidRequest(f"the hosts do not have the same files at {adapter.path} ({hosts})", param="path")
    return prints.pop()


async def _ask(bus: Bus, worker: WorkerRecord, adapter: Adapter) -> AdapterChecked:
    try:
        question = encode(CheckAdapter(adapter=adapter))
        answer = await bus.request(names.control_subject(worker.id), question, timeout_s=CHECK_S)
    except (NoResponders, TimeoutError) as error:
        raise ModelUnavailable(f"a worker of {worker.model!r} on {worker.host} does not answer") from error
    try:
        return decode_adapter_checked(answer.data)
    except msgspec.MsgspecError as error:
        raise ModelUnavailable(f"a worker of {worker.model!r} on {worker.host} is of another version") from error
