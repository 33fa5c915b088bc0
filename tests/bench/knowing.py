"""Building a knowledge base: files and chunks in a second, and how much of the time a real embedding model works."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import modelbus
from modelbus.search.embedding import embed
from modelbus_broker.asking import CallOptions
from modelbus_broker.messages import Capabilities, Deployment

from tests.helpers.heads import minilm

from .plan import Line, Plan
from .stand import ROOT, Stand

#: One of so many of our pages and modules is taken.
EVERY = 12


class Timed(modelbus.ModelClient):
    """A client that knows for how long at least one of its embedding requests was on its way."""

    def __init__(self, client: modelbus.Client) -> None:
        self.publisher = client.publisher
        self._client = client
        self._running = 0
        self._since = 0.0
        self.embedding_s = 0.0

    def capabilities(self, model: str) -> Capabilities:
        return self._client.capabilities(model)

    async def embed(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        options: CallOptions | None = None,
    ) -> modelbus.EmbeddingAnswer:
        if not self._running:
            self._since = time.perf_counter()
        self._running += 1
        try:
            return await super().embed(model, texts, dimensions=dimensions, options=options)
        finally:
            self._running -= 1
            if not self._running:
                self.embedding_s += time.perf_counter() - self._since


async def knowledge(stand: Stand, plan: Plan) -> list[Line]:
    """Some of this checkout's own pages and modules, embedded by all-MiniLM-L6-v2; then the same folder again, unchanged."""
    folder = Path(tempfile.mkdtemp(prefix="modelbus-bench-"))
    files = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "sdk").rglob("*.py")])[::EVERY]
    for file in files:
        target = folder / "files" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    try:
        await stand.search_service("storage", folder / "stores")
        await stand.deployed(
            Deployment(
                name="minilm", model="minilm", engine="transformers", revision="1", model_path=str(minilm()),
                pretrained_model_type="custom/auto",
            )
        )  # fmt: skip
        async with modelbus.connect(stand.server.url) as client:
            await client.embed("minilm", "warm")
            timed = Timed(client)
            kb = modelbus.AsyncKnowledgeBase("bench", client=timed, embedding_model="minilm")
            built = await kb.build(folder / "files")
            again = await kb.build(folder / "files")
            texts = [f"{chunk.title}\n{chunk.text}" async for chunk in kb.store.chunks()]
            # The floor: the same texts, embedded and nothing else.
            began = time.perf_counter()
            await embed(client, "minilm", texts, "lo")
            floor = time.perf_counter() - began
            await kb.drop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert not built.failed and built.written == again.unchanged == len(files)
    return [
        Line(
            what=f"knowledge base of {built.files} files, {built.chunks} chunks, all-MiniLM-L6-v2",
            modelbus=f"{built.files / built.seconds:.1f} files/s, {built.chunks / built.seconds:.1f} chunks/s",
            other=f"{len(texts) / floor:.1f} chunks/s (embedded and nothing else)",
            result=f"{floor / built.seconds:.2f}",
        ),
        Line(
            what="... share of the time in which the model embeds",
            modelbus=f"{timed.embedding_s:.1f} of {built.seconds:.1f} s",
            other="",
            result=f"{timed.embedding_s / built.seconds:.0%}",
        ),
        Line(
            what="... the same folder again, nothing has changed",
            modelbus=f"{again.seconds:.2f} s, {again.files / again.seconds:,.0f} files/s",
            other=f"{built.seconds:.1f} s",
            result=f"{built.seconds / again.seconds:.0f} times as fast",
        ),
    ]
