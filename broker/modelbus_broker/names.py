"""Names on the bus: subjects, streams, consumers, buckets, and the ids that are parts of them.

| subject | what passes |
|---|---|
| ``mb.req.<model>.<lane>.<share>`` | requests; lanes ``hi`` and ``lo`` |
| ``mb.re.<model>.<compat or any>`` | requests that go on after a failure |
| ``mb.rsp.<publisher>.<worker>`` | lists of frames |
| ``mb.gw.<publisher>`` | alive messages, with a reply inbox; no stream covers it |
| ``mb.ctl.<worker or publisher>`` | control messages |
| ``mb.ctl.workers`` | control messages for all workers |
| ``mb.find`` | who runs this id? |
| ``mb.indexing`` | files of vector stores that a gateway shall read, cut and embed |
| ``mb.dead.<model>`` | dead letters; a large body lies one token below |

A subject token has no dots, blanks or wildcards, so a model's name becomes a slug plus a hash of the name:
two names that look alike never share a queue.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from functools import lru_cache

STREAM_RE, STREAM_HI, STREAM_LO = "MB_RE", "MB_HI", "MB_LO"
STREAM_OUT, STREAM_JOBS, STREAM_DEAD, STREAM_USAGE = "MB_OUT", "MB_JOBS", "MB_DEAD", "MB_USAGE"
#: The stream that holds the requests of each lane.
LANE_STREAMS = {"re": STREAM_RE, "hi": STREAM_HI, "lo": STREAM_LO}

BUCKET_DEPLOYMENTS, BUCKET_CLAIMS, BUCKET_FAILURES = "deployments", "claims", "failures"
BUCKET_WORKERS, BUCKET_NODES = "workers", "nodes"
BUCKET_RUNS, BUCKET_ANSWERS, BUCKET_IDEMPOTENCY = "runs", "answers", "idempotency"
BUCKET_JOBS = "jobs"
BUCKET_KEYS, BUCKET_ALIASES = "keys", "aliases"
BUCKET_ADAPTERS = "adapters"
BUCKET_FILES, BUCKET_VECTOR_STORES = "files", "vector_stores"
BLOBS, FILES = "blobs", "files"
#: Files of vector stores that are to be read, cut and embedded.
STREAM_INDEXING, INDEXING, INDEXERS = "MB_INDEXING", "mb.indexing", "indexers"

#: The one priority group of every consumer; every pull names it.
GROUP = "mb"
FIND = "mb.find"
#: In place of one worker's id in ``mb.ctl.<worker>``: all of them. (No id is so: they have no "o".)
ALL_WORKERS = "workers"
USAGE = "mb.usage"
ANY_COMPAT = "any"

#: Maps a byte to one of 32 characters, for ``bytes.translate``.
_TO_BASE32 = b"0123456789abcdefghjkmnpqrstvwxyz" * 8
_UNSAFE = re.compile(r"[^a-z0-9]+")


#: Random bytes of the operating system, fetched many at a time because every request needs some; ``pop`` is atomic.
_random: list[bytes] = []
_CHUNK = 16
os.register_at_fork(after_in_child=_random.clear)


def random_token(characters: int = 12) -> str:
    """A random subject token of at most 16 characters: 5 bits each."""
    try:
        chunk = _random.pop()
    except IndexError:
        fetched = os.urandom(_CHUNK * 256)
        _random.extend(fetched[at : at + _CHUNK] for at in range(_CHUNK, len(fetched), _CHUNK))
        chunk = fetched[:_CHUNK]
    return chunk[:characters].translate(_TO_BASE32).decode()


@lru_cache(maxsize=4096)
def model_token(model: str) -> str:
    """The subject token of a model's name: a slug to read and 10 hex digits of its SHA-256 to tell names apart."""
    slug = _UNSAFE.sub("-", model.lower()).strip("-")[:32] or "m"
    return f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:10]}"


def request_subject(model: str, lane: str, share: int = 0) -> str:
    """Where a first attempt is published."""
    return f"mb.req.{model_token(model)}.{lane}.{share}"


def resume_subject(model: str, compat: str = "") -> str:
    """Where a later attempt is published: to workers of one compat, or to any."""
    return f"mb.re.{model_token(model)}.{compat or ANY_COMPAT}"


def response_subject(publisher: str, worker: str) -> str:
    return f"mb.rsp.{publisher}.{worker}"


def alive_subject(publisher: str) -> str:
    return f"mb.gw.{publisher}"


def control_subject(who: str) -> str:
    return f"mb.ctl.{who}"


def dead_subject(model: str) -> str:
    return f"mb.dead.{model_token(model)}"


def dead_body_subject(model: str, name: str) -> str:
    """Where the body of a dead letter lies that is too large for a message."""
    return f"{dead_subject(model)}.{name}"


def consumer_name(model: str, lane: str, share_or_compat: int | str) -> str:
    """The durable name of the consumer of one lane and share, or of ``re`` and one compat."""
    return f"{model_token(model)}_{lane}_{share_or_compat}"


def bucket_stream(bucket: str) -> str:
    return f"KV_{bucket}"


def bucket_subject(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"


def deployment_key(deployment: str) -> str:
    """A deployment's key in a bucket; names are free text, keys are not."""
    return model_token(deployment)


def claim_key(deployment: str, replica: int) -> str:
    return f"{deployment_key(deployment)}.{replica}"


def adapter_key(model: str, adapter: str) -> str:
    return f"{model_token(model)}.{model_token(adapter)}"


def failure_key(deployment: str, revision: str, node: str) -> str:
    return f"{deployment_key(deployment)}.{revision}.{node}"


def new_publisher_id(kind: str) -> str:
    """A publisher's id: ``g...`` for a gateway, ``s...`` for an SDK process, ``j...`` for jobs, for which nobody
    listens; 60 random bits."""
    return kind[0] + random_token(12)


def new_worker_id() -> str:
    return "w" + random_token(12)


def new_request_id(publisher: str) -> str:
    """A request's id: its publisher, the start time (Unix ms, hex) and 60 random bits. Safe in subjects and URLs."""
    return f"{publisher}-{time.time_ns() // 1_000_000:011x}-{random_token(12)}"


def publisher_of(request_id: str) -> str:
    """The publisher that made the id.

    Raises:
        ValueError: the text is not a request id.
    """
    publisher, dash, rest = request_id.partition("-")
    if not dash or "-" not in rest or not publisher.isalnum():
        raise ValueError(f"{request_id!r} is not a request id: it has the form PUBLISHER-TIME-RANDOM")
    return publisher


def started_ms_of(request_id: str) -> int:
    """When the id was made, Unix ms."""
    return int(request_id.split("-")[1], 16)


def run_name(attempt: int, delivery: int, worker: str) -> str:
    """One execution of a request."""
    return f"{attempt}.{delivery}.{worker}"


def parse_run(run: str) -> tuple[int, int, str]:
    """(attempt, delivery count, worker): runs of one request are ordered by the first two."""
    attempt, delivery, worker = run.split(".", 2)
    return int(attempt), int(delivery), worker


def run_key(request_id: str, run: str) -> str:
    """One execution among those of all requests: a run's name alone repeats from request to request."""
    return f"{request_id}/{run}"


def object_stream(bucket: str) -> str:
    """The stream of an object bucket."""
    return f"OBJ_{bucket}"


def object_subject(bucket: str, name: str) -> str:
    """Where the chunks of an object lie."""
    return f"$O.{bucket}.C.{name}"


def answer_blob(request_id: str) -> str:
    """A new blob for a kept answer that is too large for its bucket. Workers may write these blobs and no others."""
    return f"answer.{request_id}-{random_token(8)}"


def message_id(request_id: str, attempt: int) -> str:
    """The ``Nats-Msg-Id`` of an attempt: publishing it twice stores it once."""
    return f"{request_id}.{attempt}"
