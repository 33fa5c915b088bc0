"""Everything that can go wrong, as classes with a code that travels on the bus and an HTTP status.

ModelBusError
├── InvalidRequest                 400 invalid_request
│   ├── UnsupportedField           400 unsupported_field
│   │   └── UnsupportedHere        400 unsupported_here
│   ├── PromptError                400 prompt_error
│   └── ContextLengthExceeded      400 context_length_exceeded
├── AuthenticationFailed           401 invalid_api_key
├── ModelNotFound                  404 model_not_found
├── NotFound                       404 not_found
│   └── NotRecorded                404 not_recorded
├── Conflict                       409 conflict
├── KeyReused                      409 idempotency_key_reused
├── StreamMoved                    409 stream_moved
├── StreamNotResumable             410 stream_not_resumable
│   └── AnswerNotKept              410 answer_not_kept
├── RequestTooLarge                413 request_too_large
├── QueueFull                      429 queue_full
├── RequestCancelled               499 request_cancelled
├── EngineFailed                   500 engine_failed
├── TooManyRounds                  500 too_many_rounds
├── PoisonRequest                  500 poison_request
├── UpstreamFailed                 502 upstream_failed
├── OutputError                    502 invalid_output
├── WorkerLost                     502 worker_lost
├── StreamCut                      502 stream_cut
├── ModelUnavailable               503 model_unavailable
├── BusUnavailable                 503 bus_unavailable
├── GatewayStopping                503 gateway_stopping
├── AdapterUnavailable             503 adapter_unavailable
├── DeadlineExceeded               504 deadline_exceeded
├── DeploymentFailed               500 deployment_failed
│   └── NoRoom                     503 no_room
├── UndeployRefused                409 undeploy_refused
├── MissingExtra                   500 missing_extra
├── EmbeddedServerFailed           500 embedded_server_failed
└── ConfigurationError             400 configuration_error
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from .messages.publisher import Failed
from .messages.usage import Usage


class ModelBusError(Exception):
    """The root of all errors that modelbus raises.

    Attributes:
        code: a stable word for programs; travels on the bus and in OpenAI error bodies.
        status: the HTTP status that says it best.
        retryable: the same request may succeed later or elsewhere.
        param: the request field at fault, if one is.
        retry_after_s: how long to wait, 0 if unknown.
        upstream: the provider's own text, if a provider failed.
    """

    code: ClassVar[str] = "internal_error"
    default_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        param: str = "",
        retry_after_s: float = 0.0,
        upstream: str = "",
        status: int = 0,
    ) -> None:
        super().__init__(message or (self.__doc__ or "").strip().partition("\n")[0])
        self.param = param
        self.retry_after_s = retry_after_s
        self.upstream = upstream
        self.status = status or self.default_status

    @property
    def message(self) -> str:
        return str(self.args[0])

    def failed(
        self, *, id: str, run: str, seq: int, usage: Usage | None = None, retry: bool = False, handover: bool = False
    ) -> Failed:
        """The frame that carries this error to the publisher.

        ``retry``: another worker may do better. ``handover``: nothing has failed, another worker shall go on.
        """
        return Failed(
            id=id, run=run, seq=seq, code=self.code, message=self.message, status=self.status, param=self.param,
            retry_after_s=self.retry_after_s, upstream=self.upstream, usage=usage or Usage(), retry=retry,
            handover=handover,
        )  # fmt: skip


class InvalidRequest(ModelBusError):
    """The request cannot be understood."""

    code, default_status = "invalid_request", 400


class UnsupportedField(InvalidRequest):
    """The model's engine cannot do what this field asks for."""

    code = "unsupported_field"


class UnsupportedHere(UnsupportedField):
    """This worker cannot do what a field asks for; another worker of the model may."""

    code, retryable = "unsupported_here", True


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the output asked for do not fit the model's context."""

    code = "context_length_exceeded"


class PromptError(InvalidRequest):
    """A prompt function is declared or called in a way that no prompt can be made of."""

    code = "prompt_error"


class AuthenticationFailed(ModelBusError):
    """The API key is missing or wrong."""

    code, default_status = "invalid_api_key", 401


class ModelNotFound(ModelBusError):
    """No model of this name is deployed. `modelbus models` lists those that are."""

    code, default_status = "model_not_found", 404


class NotFound(ModelBusError):
    """There is nothing of this name."""

    code, default_status = "not_found", 404


class NotRecorded(NotFound):
    """A replay was asked for something that was not asked when it was recorded."""

    code = "not_recorded"


class Conflict(ModelBusError):
    """It is there already, or someone changed it meanwhile."""

    code, default_status = "conflict", 409


class KeyReused(ModelBusError):
    """Something else was asked under this Idempotency-Key. A new request needs a new key."""

    code, default_status = "idempotency_key_reused", 409


class StreamMoved(ModelBusError):
    """The answer is being read through another connection now."""

    code, default_status = "stream_moved", 409


class StreamNotResumable(ModelBusError):
    """The rest of this answer cannot be had any more. Ask again."""

    code, default_status = "stream_not_resumable", 410


class AnswerNotKept(StreamNotResumable):
    """The request was answered, and its answer could not be kept."""

    code = "answer_not_kept"


class RequestTooLarge(ModelBusError):
    """The request's body is larger than the gateway takes."""

    code, default_status = "request_too_large", 413


class QueueFull(ModelBusError):
    """The model's queue has reached its limit. Try again later."""

    code, default_status, retryable = "queue_full", 429, True


class RequestCancelled(ModelBusError):
    """The request was cancelled."""

    code, default_status = "request_cancelled", 499


class EngineFailed(ModelBusError):
    """The engine failed while it ran the request."""

    code, default_status = "engine_failed", 500


class TooManyRounds(ModelBusError):
    """The model went on calling tools after as many rounds as it may have.

    Attributes:
        rounds: of calls that were made.
        run: what has come of them, a ``modelbus.tools.ToolRun``.
    """

    code = "too_many_rounds"

    def __init__(self, message: str = "", *, rounds: int = 0, run: object = None, **more: Any) -> None:
        super().__init__(message, **more)
        self.rounds = rounds
        self.run = run


class PoisonRequest(ModelBusError):
    """The request ended its workers too often and lies with the dead letters now."""

    code, default_status = "poison_request", 500


class UpstreamFailed(ModelBusError):
    """The provider answered with an error; its own words are in ``upstream``."""

    code, default_status, retryable = "upstream_failed", 502, True


class OutputError(ModelBusError):
    """The model's answer has not the form that was asked for.

    Attributes:
        raw: what the model wrote last; over the bus it travels as ``upstream``.
        problems: what is wrong with it, each with the place where.
    """

    code, default_status = "invalid_output", 502

    def __init__(self, message: str = "", *, raw: str = "", problems: Sequence[str] = (), **more: Any) -> None:
        more.setdefault("upstream", raw)
        super().__init__(message, **more)
        self.problems = list(problems)

    @property
    def raw(self) -> str:
        return self.upstream


class WorkerLost(ModelBusError):
    """The worker was lost and no other could take over."""

    code, default_status, retryable = "worker_lost", 502, True


class StreamCut(ModelBusError):
    """The stream ended before the answer was complete."""

    code, default_status, retryable = "stream_cut", 502, True


class ModelUnavailable(ModelBusError):
    """The model is deployed but no worker of it is alive."""

    code, default_status, retryable = "model_unavailable", 503, True


class BusUnavailable(ModelBusError):
    """The bus cannot be reached. `modelbus start --head` starts one on this host."""

    code, default_status, retryable = "bus_unavailable", 503, True


class AdapterUnavailable(ModelBusError):
    """A worker cannot use the adapter that the request names; another one may."""

    code, default_status, retryable = "adapter_unavailable", 503, True


class GatewayStopping(ModelBusError):
    """The gateway is being stopped. Another one, or the same when it runs again, takes the request."""

    code, default_status, retryable = "gateway_stopping", 503, True


class DeadlineExceeded(ModelBusError):
    """The request's time was up before its answer was complete."""

    code, default_status, retryable = "deadline_exceeded", 504, True


class DeploymentFailed(ModelBusError):
    """The deployment could not be brought up; the message has the engine's own words."""

    code = "deployment_failed"


class NoRoom(DeploymentFailed):
    """No node has room for what the deployment asks for."""

    code, default_status, retryable = "no_room", 503, True


class UndeployRefused(ModelBusError):
    """Requests are waiting for this model: undeploy with `--drain` or `--drop`."""

    code, default_status = "undeploy_refused", 409


class MissingExtra(ModelBusError):
    """A library that this engine needs is not installed here."""

    code = "missing_extra"


class EmbeddedServerFailed(ModelBusError):
    """The embedded nats-server could not be started."""

    code = "embedded_server_failed"


class ConfigurationError(ModelBusError):
    """A setting has a value that it cannot have."""

    code, default_status = "configuration_error", 400


def _classes(root: type[ModelBusError]) -> list[type[ModelBusError]]:
    return [root, *(found for child in root.__subclasses__() for found in _classes(child))]


_BY_CODE = {cls.code: cls for cls in _classes(ModelBusError)}


def error_of(failed: Failed) -> ModelBusError:
    """The exception that a failed frame stands for; unknown codes of newer peers become ``ModelBusError``."""
    return _BY_CODE.get(failed.code, ModelBusError)(
        failed.message,
        param=failed.param,
        retry_after_s=failed.retry_after_s,
        upstream=failed.upstream,
        status=failed.status,
    )


def misfit(error: msgspec.ValidationError) -> InvalidRequest:
    """What msgspec says of a request that has a wrong type, with the field as its caller knows it."""
    words, _, path = str(error).partition(" - at `$.")
    place = path.rstrip("`")
    for part in ("task.", "operation.", "sampling."):
        place = place.removeprefix(part)
    words = f"{words[:1].lower()}{words[1:]}"
    return InvalidRequest(f"{place}: {words}" if place else words, param=place)
