"""What one forward pass for all is worth: tokens per second of SmolLM2, together and in turn.

python -m tests.bench.batching [TOKENS]
"""

from __future__ import annotations

import asyncio
import sys
import time

from modelbus_broker.messages import Chat, ChatMessage, Sampling
from modelbus_workers.engines.base import EngineConfig, Run
from modelbus_workers.engines.transformers import TransformersEngine

from tests.helpers.smollm2 import smollm2


async def _ask(engine: TransformersEngine, number: int, tokens: int) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    message = ChatMessage(role="user", content=f"Tell me {number} things about the sea.")
    async for _ in engine.chat(Chat(messages=[message], sampling=sampling), Run(id=f"r{number}")):
        pass


async def _rate(engine: TransformersEngine, at_once: int, tokens: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_ask(engine, number, tokens) for number in range(at_once)))
    return at_once * tokens / (time.perf_counter() - began)


async def measure(tokens: int) -> None:
    """Prints a line for each number of requests at once; prompts count as time, not as tokens."""
    params = {"num_threads": "1", "dtype": "float32", "continuous_batching": "true"}
    engine = TransformersEngine(EngineConfig(model="m", model_path=str(smollm2()), params=params, slots=8))
    await engine.start()
    assert engine._stepper is not None
    decoder = engine._stepper._decoder
    assert decoder.together
    await _rate(engine, 1, tokens)
    for at_once in (1, 2, 4, 8):
        rates = {}
        for together in (False, True):
            decoder.together = together
            rates[together] = await _rate(engine, at_once, tokens)
        ratio = rates[True] / rates[False]
        print(f"{at_once} at once: in turn {rates[False]:.1f} tokens/s, together {rates[True]:.1f}, {ratio:.2f} x")
    await engine.close()


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 32))
