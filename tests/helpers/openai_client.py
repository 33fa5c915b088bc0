"""Asks a gateway with whatever version of the `openai` package runs this, and prints what came back as JSON.

    python tests/helpers/openai_client.py BASE_URL MODEL

It is run by the interpreter of another environment, so it imports nothing of modelbus.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

QUESTION: Any = [{"role": "user", "content": "one two three"}]


def main() -> None:
    base_url, model = sys.argv[1:]
    sys.stdout.write(
        json.dumps({"version": openai.__version__, **ask(base_url, model), **asyncio.run(ask_async(base_url, model))})
    )


def ask(base_url: str, model: str) -> dict[str, Any]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        plain = client.chat.completions.create(model=model, messages=QUESTION)
        stream = client.chat.completions.create(
            model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        completion = client.completions.create(model=model, prompt="four five")
        vectors = client.embeddings.create(model=model, input=["six", "seven"])
        try:
            client.chat.completions.create(model="missing", messages=QUESTION)
            missing = ""
        except openai.NotFoundError as error:
            missing = str(error.code)
        return {
            "plain": plain.choices[0].message.content,
            "plain_usage": plain.usage.total_tokens if plain.usage else 0,
            "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "stream_usage": chunks[-1].usage.total_tokens if chunks[-1].usage else 0,
            "completion": completion.choices[0].text,
            "vectors": len(vectors.data),
            "models": [found.id for found in client.models.list()],
            "missing": missing,
        }


async def ask_async(base_url: str, model: str) -> dict[str, Any]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        plain = await client.chat.completions.create(model=model, messages=QUESTION)
        text = ""
        async for chunk in await client.chat.completions.create(model=model, messages=QUESTION, stream=True):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return {"async_plain": plain.choices[0].message.content, "async_stream": text}


if __name__ == "__main__":
    main()
