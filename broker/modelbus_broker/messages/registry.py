"""Records in the buckets: what is wished for, what is claimed, what is alive, and why a start failed."""

from __future__ import annotations

from typing import Literal

import msgspec

from .base import Message


class Deployment(Message, frozen=True, kw_only=True, tag="deployment"):
    """The wish: this model on this engine, N workers, so much of a host each. Key: ``name``."""

    name: str
    model: str
    engine: str
    revision: str  #: changes with every deploy
    engine_params: dict[
        str, str
    ] = {}  #: ``backend.*`` and ``saas.*`` with the prefix cut; secrets as ``env:``/``file:``
    sealed: dict[str, str] = {}  #: secret parameters, sealed to the cluster's node key
    model_path: str = ""
    pretrained_model_type: str = ""  #: as the user wrote it
    replicas: int = 1
    slots: int = 0  #: requests at once per worker; 0 = the engine's own number
    cpus: float = 0.01
    memory_mb: int = 0
    gpus: float = 0.0
    require: dict[str, str] = {}  #: labels a node must have
    shares: int = 1  #: tenant shares per lane
    queue_limit: int = 10_000
    max_crashes: int = 3
    budget_ms: int = 600_000
    priority: int = 0  #: of its pulls: 0 is served first, 9 last
    exclusive: bool = False  #: at most one worker may ever run a replica
    created_ms: int = 0
    drain_s: float = 25.0  #: after SIGTERM a worker finishes what it can for so long, then hands over what is left
    closing: bool = False  #: it is being undeployed: no new requests, what waits is served
    wait_until_ms: int = (
        0  #: until then (Unix time) requests wait where no worker is ready: a revision is being replaced
    )
    engine_stall_s: float = 60.0  #: an engine that makes no step for so long while requests run hangs; 0: never
    orphan_grace_s: float = 30.0  #: a streamed request runs on for so long when its publisher is gone


class Claim(Message, frozen=True, kw_only=True, tag="claim"):
    """A node runs this replica. Key: ``<deployment>.<n>``. A released claim is a deleted key."""

    deployment: str
    replica: int
    node: str
    revision: str
    worker: str = ""
    claimed_ms: int = 0


class StartFailure(Message, frozen=True, kw_only=True, tag="start_failure"):
    """Why a node could not run a replica. Key: ``<deployment>.<revision>.<node>``; excludes that node for that revision,
    or until ``again_ms``."""

    deployment: str
    revision: str
    node: str
    words: str  #: the engine's own
    replica: int = 0
    at_ms: int = 0
    again_ms: int = 0  #: Unix time of the node's next try: a server that the engine needs does not answer; 0: none


class AdapterRecord(Message, frozen=True, kw_only=True, tag="adapter"):
    """An adapter of a model. Key: ``names.adapter_key(model, name)``."""

    model: str
    name: str
    path: str  #: a folder on the hosts of the workers
    fingerprint: str  #: of its files
    created_ms: int = 0


class Capabilities(Message, frozen=True, kw_only=True):
    """What a worker's engine can do with its model."""

    tasks: list[str] = []  #: chat, completion, embedding, score, classification
    streaming: bool = True
    can_continue: bool = False  #: goes on from given output token ids
    prefill: bool = False  #: goes on with a last message of the assistant, where others answer it
    adapters: bool = False  #: a request may name an adapter (LoRA)
    vision: bool = False
    audio: bool = False
    files: bool = False
    tools: bool = False
    json_object: bool = False
    json_schema: bool = False
    grammar: bool = False  #: the engine holds the model to a JSON schema: it can write nothing else
    native_tools: bool = False  #: the model, or its provider, was made to call tools: nobody needs to explain them
    logprobs: bool = False
    n: bool = False
    seed: bool = False
    penalties: bool = False
    logit_bias: bool = False
    token_prompts: bool = False
    context_length: int = 0  #: tokens; 0 = not known
    dimensions: int = 0  #: of embeddings
    #: Chat and completion fields beyond the ones above that the engine understands; ["*"] = passes all on.
    extra_fields: list[str] = []


class WorkerRecord(Message, frozen=True, kw_only=True, tag="worker"):
    """A worker says who it is and how it is, over the connection that it pulls with. Key: ``id``. TTL 10 s."""

    id: str
    model: str
    deployment: str
    revision: str
    replica: int
    node: str
    engine: str
    state: Literal["starting", "ok", "failed", "draining", "gone"]
    slots: int = 0
    busy: int = 0
    compat: str = ""
    capabilities: Capabilities = Capabilities()
    words: str = ""  #: what the engine said last, when it failed or is loading
    retryable: bool = False  #: it failed for want of something that may come back
    total_requests: int = 0
    failed_requests: int = 0
    last_work_ms: int = 0  #: Unix time; 0 = never
    started_ms: int = 0
    pid: int = 0
    host: str = ""
    gpus: list[int] = []
    steps: int = 0


class GPU(Message, frozen=True, kw_only=True):
    index: int
    name: str
    memory_mb: int
    uuid: str = ""


class NodeRecord(Message, frozen=True, kw_only=True, tag="node"):
    """What a host offers and what of it is taken. Key: ``id``. TTL 10 s."""

    id: str
    host: str
    pid: int = 0
    cpus: float = 0.0
    cpus_free: float = 0.0
    memory_mb: int = 0
    memory_free_mb: int = 0
    gpus: list[GPU] = []
    gpus_free: list[float] = []  #: per device, 1.0 = all of it
    labels: dict[str, str] = {}
    engines: list[str] = []  #: that can be imported here
    missing: dict[str, str] = {}  #: engine -> why it cannot be used here
    replicas: list[str] = []  #: claimed: ``<deployment>.<n>``
    refused: dict[str, str] = {}  #: ``<deployment>.<revision>`` -> why there is no room here
    seal_key: str = ""  #: public key (hex) that deployers seal secrets to
    version: str = ""
    started_ms: int = 0


decode_deployment = msgspec.msgpack.Decoder(Deployment).decode
decode_claim = msgspec.msgpack.Decoder(Claim).decode
decode_start_failure = msgspec.msgpack.Decoder(StartFailure).decode
decode_adapter = msgspec.msgpack.Decoder(AdapterRecord).decode
decode_worker = msgspec.msgpack.Decoder(WorkerRecord).decode
decode_node = msgspec.msgpack.Decoder(NodeRecord).decode
