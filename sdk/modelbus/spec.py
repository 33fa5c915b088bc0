"""What a user asks to deploy, in the seed's words, and what that means for an engine."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from modelbus_broker.errors import ConfigurationError

#: Engine of each ``--infer_backend``; "" is the default.
_BACKENDS = {
    "": "transformers",
    "transformers": "transformers",
    "vllm": "vllm",
    "ray/vllm": "vllm",
    "llama_cpp": "llama_cpp",
}
#: ``custom/...`` families that are chat or embedding models of the transformers library.
_FAMILIES = frozenset(
    {
        "auto", "bge", "m3e", "llama", "llama2", "chatglm2", "chatglm6b", "zephyr", "starcode", "moss", "dolly",
        "baichuan", "falcon", "qwen", "alpha_moss",
    }
)  # fmt: skip

_SECRET_NAME = re.compile(
    r"(^|[._-])((api|secret|access|aws_access|aws_secret|public)_?key|key|\w*token|\w*secret|password)$"
)
_URL_WITH_PASSWORD = re.compile(r"^\w+://[^/@\s]+:[^/@\s]*@")
#: Prefixes of infer_params that only say who the parameter is for.
_ENGINE_PREFIXES = ("saas.", "backend.")
_REQUEST_PREFIXES = ("gen.", "generation.")


class DeploySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment as a user asks for it; the fields are the flags of ``modelbus deploy``."""

    model: str
    #: ``saas/NAME`` (a provider), ``custom/auto`` (weights in ``model_path``), or an engine's name such as ``echo``.
    pretrained_model_type: str = "custom/auto"
    infer_backend: str = ""  #: for ``custom/...``: transformers (the default), vllm, llama_cpp
    model_path: str = ""  #: on the nodes
    #: ``saas.*`` and ``backend.*`` for the engine, ``resource.*`` for labels. Secrets: a value, env:NAME or file:PATH.
    infer_params: Mapping[str, str] = {}
    num_workers: int = 1
    worker_concurrency: int = 0  #: requests at once per worker; 0 = the engine's own number
    cpus_per_worker: float = 0.01
    gpus_per_worker: float = 0.0
    memory_mb: int = 0
    require: Mapping[str, str] = {}  #: labels a node must have
    queue_limit: int = 10_000  #: requests that may wait
    budget_s: float = 600.0  #: of a request that names none
    shares: int = 1
    priority: int = 0  #: 0 is served first, 9 last
    name: str = ""  #: of the deployment; "" = the model's
    timeout_s: float = 600.0  #: for coming up
    drain_s: float = 25.0  #: a worker that is stopped finishes what it can for so long, then hands over
    engine_stall_s: float = 60.0  #: a worker whose engine makes no step for so long while requests run ends; 0: never
    orphan_grace_s: float = 30.0  #: a stream runs on for so long when its gateway is gone
    exclusive: bool = False  #: never two workers of a replica at once, not even while one replaces the other

    @property
    def deployment(self) -> str:
        return self.name or self.model

    def __repr__(self) -> str:
        return (
            f"DeploySpec(model={self.model!r}, pretrained_model_type={self.pretrained_model_type!r}, "
            f"infer_params={masked(self.infer_params)!r}, num_workers={self.num_workers})"
        )


class EngineChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine a spec means, and with what."""

    engine: str
    params: dict[str, str] = {}  #: prefix cut; no plain secret
    secrets: dict[str, str] = {}  #: prefix cut; to be sealed
    require: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"EngineChoice(engine={self.engine!r}, params={self.params!r}, secrets={sorted(self.secrets)!r})"


def is_secret(name: str, value: str = "") -> bool:
    """Whether a parameter must be sealed and never shown: by its name, or because a URL holds a password."""
    lowered = name.lower()
    return (
        _SECRET_NAME.search(lowered) is not None
        or lowered.split(".")[-2:-1] == ["header"]
        or _URL_WITH_PASSWORD.match(value) is not None
    )


def is_reference(value: str) -> bool:
    """``env:NAME`` and ``file:PATH`` are resolved on the node and are no secrets themselves."""
    return value.startswith(("env:", "file:"))


def masked(params: Mapping[str, str]) -> dict[str, str]:
    """The parameters as they may be shown."""
    return {
        name: "***" if is_secret(name, value) and not is_reference(value) else value for name, value in params.items()
    }


def parse_params(pairs: list[str] | tuple[str, ...]) -> dict[str, str]:
    """``["saas.model=x", ...]`` as a dict.

    Raises:
        ConfigurationError: an item is no ``key=value``, or a key is given twice.
    """
    params: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            # Not the item itself: it may be a secret whose key was forgotten.
            raise ConfigurationError(
                "--infer_params takes KEY=VALUE items, such as saas.model=gpt-4o; one of them has no key or no '='"
            )
        if key in params:
            raise ConfigurationError(f"--infer_params names {key} twice")
        params[key] = value
    return params


def engine_choice(spec: DeploySpec) -> EngineChoice:
    """The engine of a spec and its parameters, prefixes cut and secrets apart.

    Raises:
        ConfigurationError: the spec cannot be meant as it stands; the message says what to write.
    """
    _check_numbers(spec)
    engine = _engine(spec)
    params: dict[str, str] = {}
    secrets: dict[str, str] = {}
    require = dict(spec.require)
    for key, value in spec.infer_params.items():
        if key.startswith("resource."):
            # The seed counted custom resources; a label of that name, whatever its value, says the same.
            require.setdefault(key.removeprefix("resource."), "")
            continue
        if key.startswith(_REQUEST_PREFIXES):
            raise ConfigurationError(f"{key} belongs to a request, not to a deployment: give it in llm_config")
        name = key
        for prefix in _ENGINE_PREFIXES:
            name = name.removeprefix(prefix)
        if name in params or name in secrets:
            raise ConfigurationError(f"parameter {name} is given twice, with and without its prefix")
        if is_secret(key, value):
            if not value or value in ("env:", "file:"):
                raise ConfigurationError(
                    f"{key} is empty: is the variable set in this shell? Write {key}=VALUE, "
                    f"{key}=env:NAME (read on the node) or {key}=file:PATH"
                )
            if not is_reference(value):
                secrets[name] = value
                continue
        params[name] = value
    return EngineChoice(engine=engine, params=params, secrets=secrets, require=require)


def _engine(spec: DeploySpec) -> str:
    family, slash, kind = spec.pretrained_model_type.partition("/")
    if family == "saas" and slash:
        if not kind:
            raise ConfigurationError("--pretrained_model_type saas/NAME lacks the provider's name, such as saas/openai")
        return "openai"
    if family == "custom" and slash:
        if spec.infer_backend not in _BACKENDS:
            raise ConfigurationError(
                f"--infer_backend {spec.infer_backend!r} is not known: use {', '.join(sorted(filter(None, _BACKENDS)))}"
            )
        if kind not in _FAMILIES:
            raise ConfigurationError(
                f"--pretrained_model_type {spec.pretrained_model_type} is not served yet: use custom/auto for chat and "
                "text models, custom/bge or custom/m3e for embeddings"
            )
        if not spec.model_path:
            raise ConfigurationError(
                f"--pretrained_model_type {spec.pretrained_model_type} needs --model_path: the folder of the weights, "
                "as the nodes see it"
            )
        return _BACKENDS[spec.infer_backend]
    if slash or not family:
        raise ConfigurationError(
            f"--pretrained_model_type {spec.pretrained_model_type!r} is not known: write saas/NAME for a provider, "
            "custom/auto for weights on disk, or an engine's name such as echo"
        )
    return family


def _check_numbers(spec: DeploySpec) -> None:
    if not spec.model.strip():
        raise ConfigurationError("--model is empty: it is the name that clients address")
    for flag, number, least in (
        ("--num_workers", spec.num_workers, 1),
        ("--worker_concurrency", spec.worker_concurrency, 0),
        ("--cpus_per_worker", spec.cpus_per_worker, 0),
        ("--gpus_per_worker", spec.gpus_per_worker, 0),
        ("--memory_mb", spec.memory_mb, 0),
        ("--queue_limit", spec.queue_limit, 1),
        ("--shares", spec.shares, 1),
    ):
        if number < least:
            raise ConfigurationError(f"{flag} {number} is too small: it is at least {least}")
    if not 0 <= spec.priority <= 9:
        raise ConfigurationError(f"--priority {spec.priority} is out of range: 0 is served first, 9 last")
    if not 0 <= spec.drain_s <= 3600:
        raise ConfigurationError(f"--drain_s {spec.drain_s:g} is out of range: 0 to 3600 seconds")
    if spec.engine_stall_s and not 1 <= spec.engine_stall_s <= 86400:
        raise ConfigurationError(
            f"--engine_stall_s {spec.engine_stall_s:g} is out of range: 1 to 86400 seconds, or 0 for never"
        )
    if not 3 <= spec.orphan_grace_s <= 86400:
        raise ConfigurationError(f"--orphan_grace_s {spec.orphan_grace_s:g} is out of range: 3 to 86400 seconds")
    if spec.budget_s <= 0 or spec.timeout_s <= 0:
        raise ConfigurationError("--budget_s and --timeout_s must be more than 0")
