"""Streams, buckets and consumers: one idempotent declaration, made by whoever starts or deploys.

It is JSON, not nats-py's classes, because those have no fields for priority groups and message TTLs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import names
from .connection import Bus, JetStreamError
from .errors import BusUnavailable, ModelBusError
from .settings import BusSettings

log = logging.getLogger(__name__)

_S = 1_000_000_000  # nanoseconds in a second
_MIB = 1 << 20

#: How long a worker may be silent about a message before another gets it; in-progress acks come every 3 s.
ACK_WAIT_S = 10


def _stream(name: str, subjects: list[str], **more: Any) -> dict[str, Any]:
    return {
        "name": name, "subjects": subjects, "storage": "file", "retention": "limits", "discard": "old",
        "max_msgs": -1, "max_bytes": -1, "max_age": 0, "max_consumers": -1, "max_msg_size": -1,
        "duplicate_window": 120 * _S, "allow_direct": True, "num_replicas": 1,
    } | more  # fmt: skip


def _queue(name: str, subjects: list[str], max_msgs: int) -> dict[str, Any]:
    return _stream(
        name, subjects, retention="workqueue", discard="new", max_msgs=max_msgs, max_bytes=4096 * _MIB,
        allow_msg_ttl=True,
    )  # fmt: skip


def _bucket(name: str, *, memory: bool = False, ttl_s: int = 0) -> dict[str, Any]:
    return _stream(
        names.bucket_stream(name), [f"$KV.{name}.>"], storage="memory" if memory else "file",
        max_msgs_per_subject=1, discard="new", allow_rollup_hdrs=True, allow_msg_ttl=True, max_age=ttl_s * _S,
        subject_delete_marker_ttl=60 * _S,
        duplicate_window=(min(ttl_s, 120) or 120) * _S,
    )  # fmt: skip


_HOUR = 3600

#: ``re`` is never refused: at most one message there per running request.
STREAMS = [
    _queue(names.STREAM_RE, ["mb.re.>"], -1),
    _queue(names.STREAM_HI, ["mb.req.*.hi.>"], 1_000_000),
    _queue(names.STREAM_LO, ["mb.req.*.lo.>"], 10_000_000),
    _stream(names.STREAM_OUT, ["mb.rsp.>"], storage="memory", no_ack=True, max_age=600 * _S, max_bytes=64 * _MIB),
    _stream(names.STREAM_JOBS, ["mb.jobs.>"], retention="workqueue", discard="new", max_bytes=1024 * _MIB),
    _stream(names.STREAM_DEAD, ["mb.dead.>"], max_bytes=1024 * _MIB),
    _stream(names.STREAM_USAGE, [names.USAGE], max_bytes=1024 * _MIB),
    _stream(names.STREAM_INDEXING, [names.INDEXING], retention="workqueue", discard="new", max_bytes=1024 * _MIB),
]
BUCKETS = [
    _bucket(names.BUCKET_DEPLOYMENTS),
    _bucket(names.BUCKET_CLAIMS),
    _bucket(names.BUCKET_FAILURES, ttl_s=24 * _HOUR),
    _bucket(names.BUCKET_WORKERS, memory=True, ttl_s=10),
    _bucket(names.BUCKET_NODES, memory=True, ttl_s=10),
    _bucket(names.BUCKET_RUNS, ttl_s=_HOUR),
    # Every answer says itself how long it is kept.
    _bucket(names.BUCKET_ANSWERS, ttl_s=31 * 24 * _HOUR),
    _bucket(names.BUCKET_JOBS, ttl_s=32 * 24 * _HOUR),
    _bucket(names.BUCKET_IDEMPOTENCY, ttl_s=24 * _HOUR),
    _bucket(names.BUCKET_KEYS),
    _bucket(names.BUCKET_ALIASES),
    _bucket(names.BUCKET_ADAPTERS),
    _bucket(names.BUCKET_FILES),
    _bucket(names.BUCKET_VECTOR_STORES),
    # Object buckets' streams; see blobs.py for what lies in them.
    _stream(names.object_stream(names.BLOBS), [f"$O.{names.BLOBS}.>"], discard="new", allow_rollup_hdrs=True,
            max_age=25 * _HOUR * _S, max_bytes=8192 * _MIB, duplicate_window=120 * _S),
    _stream(names.object_stream(names.FILES), [f"$O.{names.FILES}.>"], discard="new", allow_rollup_hdrs=True,
            max_bytes=8192 * _MIB, duplicate_window=120 * _S),
]  # fmt: skip


async def declare_bus(bus: Bus, *, replicas: int = 1) -> None:
    """Makes all streams and buckets that are not there yet, and updates those that differ.

    Args:
        replicas: copies of each stream in a cluster of servers: 1, 3 or 5.

    Raises:
        JetStreamError: the server refuses one (for instance R3 on a single server).
        BusUnavailable: JetStream does not answer.
    """
    for config in STREAMS + BUCKETS:
        await _declare_stream(bus, config | {"num_replicas": replicas})
    await _declare_indexers(bus)


async def declare_memory(bus: Bus) -> None:
    """Makes the memory streams and buckets again: a restarted server has forgotten them.

    Cheap when they are there. How many copies they have is read off a file stream that outlived the restart.
    """
    info = await bus.js_request(f"STREAM.INFO.{names.STREAM_HI}")
    replicas = int(info["config"].get("num_replicas", 1))
    for config in STREAMS + BUCKETS:
        if config["storage"] == "memory":
            await _declare_stream(bus, config | {"num_replicas": replicas})


async def restore_memory(bus: Bus) -> None:
    """To be called after a reconnect: makes the memory streams and buckets again as soon as the server answers.

    A server that has just started, or a cluster that has no leader yet, may not do so at once. Returns when they are
    there, when the connection is lost again, or at once where our credential does not let us make streams.
    """
    if not may_declare(bus.settings):
        return
    connected_at = bus.connected_at
    while bus.connected_at == connected_at and not bus.closed.is_set():
        try:
            await declare_memory(bus)
            return
        except ModelBusError as error:
            log.warning("what the bus keeps in memory cannot be made again yet: %s", error.message)
            await asyncio.sleep(0.5)


def may_declare(settings: BusSettings) -> bool:
    """Whether our credential is one that may make streams and write what is deployed."""
    if not settings.creds:
        return True
    from .credentials import load_credential

    return load_credential(Path(settings.creds).expanduser()).may_administer


async def _declare_stream(bus: Bus, config: dict[str, Any]) -> None:
    try:
        await bus.js_request(f"STREAM.CREATE.{config['name']}", config)
    except JetStreamError as error:
        if error.err_code != 10058:  # the name is in use with another configuration
            raise
        await bus.js_request(f"STREAM.UPDATE.{config['name']}", config)


class ConsumerRef(msgspec.Struct, frozen=True):
    """One durable consumer of a work queue."""

    stream: str
    name: str
    filter_subject: str
    lane: str


def consumers_of(model: str, shares: int = 1, compats: Sequence[str] = ()) -> list[ConsumerRef]:
    """The consumers of a model in the order in which a worker asks them: re, hi, lo."""
    found = [
        ConsumerRef(
            names.STREAM_RE, names.consumer_name(model, "re", compat), names.resume_subject(model, compat), "re"
        )
        for compat in [*compats, names.ANY_COMPAT]
    ]
    for lane in ("hi", "lo"):
        for share in range(shares):
            found.append(
                ConsumerRef(
                    names.LANE_STREAMS[lane],
                    names.consumer_name(model, lane, share),
                    names.request_subject(model, lane, share),
                    lane,
                )
            )
    return found


async def declare_model(bus: Bus, model: str, *, shares: int = 1, compats: Sequence[str] = ()) -> None:
    """Makes the consumers of a model: one per lane and share, and the ``re`` ones of the compats.

    All are ``prioritized`` with one group from the start: a later change of the policy breaks running pulls.
    """
    await asyncio.gather(*(_declare_consumer(bus, consumer) for consumer in consumers_of(model, shares, compats)))


async def declare_resume(bus: Bus, model: str, compat: str) -> None:
    """Makes the consumer that answers of this compat go on through, should nobody have made it."""
    name, subject = names.consumer_name(model, "re", compat), names.resume_subject(model, compat)
    await _declare_consumer(bus, ConsumerRef(names.STREAM_RE, name, subject, "re"))


async def _declare_consumer(bus: Bus, consumer: ConsumerRef) -> None:
    config = {
        "name": consumer.name, "durable_name": consumer.name, "filter_subject": consumer.filter_subject,
        "ack_policy": "explicit", "deliver_policy": "all", "replay_policy": "instant", "ack_wait": ACK_WAIT_S * _S,
        # A message that exhausts its deliveries would stay in the queue, seen by nobody.
        "max_deliver": -1, "max_ack_pending": 20_000, "max_waiting": 8_192, "num_replicas": 0,
        "priority_policy": "prioritized", "priority_groups": [names.GROUP],
    }  # fmt: skip
    body = {"stream_name": consumer.stream, "config": config, "action": ""}
    await bus.js_request(f"CONSUMER.CREATE.{consumer.stream}.{consumer.name}.{consumer.filter_subject}", body)


async def _declare_indexers(bus: Bus) -> None:
    """Makes the one consumer through which gateways take the files that are to be indexed."""
    config = {
        "name": names.INDEXERS, "durable_name": names.INDEXERS, "filter_subject": names.INDEXING,
        "ack_policy": "explicit", "deliver_policy": "all", "replay_policy": "instant", "ack_wait": ACK_WAIT_S * _S,
        "max_deliver": -1, "max_ack_pending": 1_000, "num_replicas": 0,
    }  # fmt: skip
    body = {"stream_name": names.STREAM_INDEXING, "config": config, "action": ""}
    await bus.js_request(f"CONSUMER.CREATE.{names.STREAM_INDEXING}.{names.INDEXERS}.{names.INDEXING}", body)


async def _model_consumers(bus: Bus, model: str) -> list[tuple[str, dict[str, Any]]]:
    """(stream, consumer info) of every consumer that the model has, also of shares and compats nobody remembers."""
    prefix = f"{names.model_token(model)}_"
    found: list[tuple[str, dict[str, Any]]] = []
    for stream in names.LANE_STREAMS.values():
        offset, total = 0, 1
        while offset < total:
            page = await bus.js_request(f"CONSUMER.LIST.{stream}", {"offset": offset})
            found += [(stream, info) for info in page["consumers"] if info["name"].startswith(prefix)]
            total = page["total"]
            offset += len(page["consumers"]) or total
    return found


async def queued(bus: Bus, model: str) -> int:
    """How many requests of the model wait; those that run do not count."""
    return sum(int(info["num_pending"]) for _, info in await _model_consumers(bus, model))


async def running(bus: Bus, model: str) -> int:
    """How many requests of the model are with a worker."""
    return sum(int(info["num_ack_pending"]) for _, info in await _model_consumers(bus, model))


async def remove_model(bus: Bus, model: str) -> None:
    """Removes the consumers of a model and all of its messages."""
    for stream, info in await _model_consumers(bus, model):
        await bus.js_request(f"CONSUMER.DELETE.{stream}.{info['name']}")
    for stream, subject in model_subjects(model):
        await bus.js_request(f"STREAM.PURGE.{stream}", {"filter": subject})


def model_subjects(model: str) -> Iterator[tuple[str, str]]:
    """(stream, subject filter) of everything that may wait for a model."""
    token = names.model_token(model)
    yield names.STREAM_RE, f"mb.re.{token}.>"
    yield names.STREAM_HI, f"mb.req.{token}.hi.>"
    yield names.STREAM_LO, f"mb.req.{token}.lo.>"


async def depths(bus: Bus) -> dict[str, int]:
    """Messages per model token in the request streams, running ones included.

    Raises:
        BusUnavailable: JetStream does not answer.
    """
    found: dict[str, int] = {}
    for stream in names.LANE_STREAMS.values():
        try:
            info = await bus.js_request(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        except JetStreamError as error:
            raise BusUnavailable(f"the stream {stream} is not there: run `modelbus start --head`") from error
        for subject, count in (info["state"].get("subjects") or {}).items():
            token = subject.split(".")[2]
            found[token] = found.get(token, 0) + int(count)
    return found
