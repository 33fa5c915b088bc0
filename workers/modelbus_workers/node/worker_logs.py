"""Answers the question for the last lines of the workers' logs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from modelbus_broker.connection import Msg
from modelbus_broker.messages import Deployment
from modelbus_broker.names import model_token

from .processes import log_path, tail

#: Where everybody asks.
LOGS = "mb.logs"


def logs_answer(msg: Msg, logs: Path, node: str, deployments_of: Callable[[str], Iterable[Deployment]]) -> bytes:
    """``{"model", "lines"}`` -> ``{"node", "host", "workers": [{"deployment", "replica", "lines"}]}``; b"" for nothing."""
    try:
        asked = json.loads(msg.data)
        model, lines = str(asked["model"]), min(10_000, max(1, int(asked.get("lines", 100))))
    except (ValueError, KeyError, TypeError):
        return b""
    found = []
    for deployment in sorted({model, *(each.name for each in deployments_of(model))}):
        for number in _logged_replicas(logs, deployment):
            text = tail(log_path(logs, deployment, number), lines)
            found.append({"deployment": deployment, "replica": number, "lines": text})
    return json.dumps({"node": node, "host": socket.gethostname(), "workers": found}).encode() if found else b""


def _logged_replicas(logs: Path, deployment: str) -> list[int]:
    token = model_token(deployment)
    numbers = (path.name.removeprefix(f"{token}.").removesuffix(".log") for path in logs.glob(f"{token}.*.log"))
    return sorted(int(number) for number in numbers if number.isdigit())
