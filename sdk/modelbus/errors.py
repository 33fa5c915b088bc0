"""The errors of modelbus, in one tree under ``ModelBusError``; see ``modelbus_broker.errors`` for the drawing."""

from __future__ import annotations

from modelbus_broker.errors import (
    AnswerNotKept,
    AuthenticationFailed,
    BusUnavailable,
    ConfigurationError,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    DeploymentFailed,
    EmbeddedServerFailed,
    EngineFailed,
    GatewayStopping,
    InvalidRequest,
    KeyReused,
    MissingExtra,
    ModelBusError,
    ModelNotFound,
    ModelUnavailable,
    NoRoom,
    NotFound,
    PoisonRequest,
    QueueFull,
    RequestCancelled,
    RequestTooLarge,
    StreamCut,
    StreamMoved,
    StreamNotResumable,
    UndeployRefused,
    UnsupportedField,
    UpstreamFailed,
    WorkerLost,
)

__all__ = [
    "AnswerNotKept", "AuthenticationFailed", "BusUnavailable", "ConfigurationError", "Conflict",
    "ContextLengthExceeded", "DeadlineExceeded", "DeploymentFailed", "EmbeddedServerFailed", "EngineFailed",
    "GatewayStopping", "InvalidRequest", "KeyReused", "MissingExtra", "ModelBusError", "ModelNotFound",
    "ModelUnavailable", "NoRoom", "NotFound", "PoisonRequest", "QueueFull", "RequestCancelled", "RequestTooLarge",
    "StreamCut", "StreamMoved", "StreamNotResumable", "UndeployRefused", "UnsupportedField", "UpstreamFailed",
    "WorkerLost",
]  # fmt: skip
