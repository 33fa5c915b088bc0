"""Answers of prompt functions that were given before; see ``modelbus.cache``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from modelbus_broker.errors import OutputError, PromptError
from modelbus_broker.messages import encode

from ..cache import Cache, CachedAnswer, cache_key, is_deterministic
from ..model_client import ModelClient
from ..structure import Result
from ..structure.replies import Reply

if TYPE_CHECKING:
    from .running import RenderedCall


class Caching:
    """What ``with_cache`` says."""

    __slots__ = ("always", "cache")

    def __init__(self, cache: Cache, *, always: bool) -> None:
        self.cache, self.always = cache, always

    async def answer(
        self,
        call: RenderedCall,
        client: ModelClient,
        emit: Callable[[str], None] | None,
        ask: Callable[[], Awaitable[Result[Any]]],
    ) -> Result[Any]:
        """The answer that is kept, or a new one, which is kept then.

        Raises:
            PromptError: the answer would differ from call to call, and nobody said that this does not matter.
            ModelBusError: what asking raises.
        """
        if not self.always and not is_deterministic(call.sampling):
            raise PromptError(
                f"{call.name}: an answer is only kept where the same question gives the same one: "
                "with_options(temperature=0), with_options(seed=1), or with_cache(cache, always=True)"
            )
        if call.tools is not None:
            raise PromptError(
                f"{call.name}: what tools give is not kept, so neither is an answer that is made with them"
            )
        key = _key(call, client)
        if (kept := self.cache.get(key)) is not None:
            try:
                result = _result(call, kept)
            except OutputError:
                pass  # a validator has other ideas than when it was kept
            else:
                if emit is not None:
                    emit(kept.raw)
                return result
        result = await ask()
        if result.raw:
            self.cache.put(
                key,
                CachedAnswer(
                    raw=result.raw, usage=result.usage, model=result.model, rung=result.rung, attempts=result.attempts,
                    request_id=result.request_id, finish_reason=result.finish_reason,
                ),
            )  # fmt: skip
        return result


def _key(call: RenderedCall, client: ModelClient) -> str:
    return cache_key({
        "version": call.version, "name": call.name, "model": call.model, "revision": client.revision(call.model),
        "adapter": call.options.adapter, "messages": encode(call.messages).hex(), "sampling": call.sampling,
        "schema": call.output.schema, "ladder": call.ladder, "prefix": call.prefix, "max_turns": call.max_turns,
    })  # fmt: skip


def _result(call: RenderedCall, kept: CachedAnswer) -> Result[Any]:
    text = call.output.kind == "text"
    value = kept.raw if text else call.output.read(Reply(text=kept.raw, finish_reason=kept.finish_reason))
    return Result(
        value=value, raw=kept.raw, usage=kept.usage, model=kept.model, rung=kept.rung, attempts=kept.attempts,
        request_id=kept.request_id, finish_reason=kept.finish_reason,
    )  # fmt: skip
