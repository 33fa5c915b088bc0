"""Adapters (LoRA) of requests: loaded into vLLM when the first request names them."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from modelbus_broker.errors import WorkerLost
from modelbus_broker.messages import Adapter


class CannotLoad(Exception):
    """vLLM refuses an adapter; it has its words."""


class Adapters:
    """Those that one vLLM has loaded. vLLM itself keeps as many as ``max_cpu_loras`` says and reads others again."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._loaded: dict[int, Any] = {}
        self._lock = asyncio.Lock()

    async def request(self, adapter: Adapter, fingerprint: str) -> Any:
        """vLLM's word for a request's adapter; ``fingerprint``: of the files that lie there now.

        Raises:
            CannotLoad: it is for another model, its rank is too high ...
        """
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        # Adapters are told apart by this number: the same one for the same weights in all requests.
        digest = hashlib.sha256(f"{adapter.name}\0{adapter.path}\0{fingerprint}".encode()).digest()
        number = int.from_bytes(digest[:4], "big") % 0x7FFFFFFF + 1
        # Loaded here, since vLLM would only miss it in the middle of a step, and end.
        async with self._lock:
            if number not in self._loaded:
                made = LoRARequest(lora_name=adapter.name, lora_int_id=number, lora_path=adapter.path)
                try:
                    await self._engine.add_lora(made)
                except EngineDeadError as error:
                    raise WorkerLost(f"vLLM's engine core has died: {error}") from error
                except Exception as error:  # whatever happened there comes back as this
                    raise CannotLoad(str(error)) from error
                self._loaded[number] = made
        return self._loaded[number]
