"""A folder becomes a knowledge base and stays one, over a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import modelbus
import msgspec
import pytest
import pytest_asyncio
from modelbus.cli.doc import _bar
from modelbus.errors import InvalidRequest, ModelNotFound
from modelbus.knowledge.answering import answer, contexts, standing_alone
from modelbus.knowledge.building import BuildReport, build
from modelbus.knowledge.documents import MAX_FILE_BYTES

from tests.helpers.cluster import Cluster
from tests.helpers.search_cluster import search_cluster
from tests.helpers.seed_document import document

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with search_cluster(tmp_path_factory.mktemp("search")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def store(shared: Cluster) -> AsyncIterator[modelbus.AsyncStore]:
    async with modelbus.connect(shared.server.url) as client:
        store = modelbus.AsyncStore("kb", client=client, embedding_model="emb")
        yield store
        await store.drop()


def counts(report: BuildReport) -> tuple[int, int, int, int]:
    return report.files, report.unchanged, report.written, report.removed


async def files(store: modelbus.AsyncStore) -> set[str]:
    return {Path(chunk.file_id).name async for chunk in store.chunks()}


async def test_only_what_has_changed_is_read_and_embedded_again(store: modelbus.AsyncStore, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    long = "\n\n".join(f"## Part {n}\n\n" + f"Sentence {n} says something. " * 30 for n in range(20))
    (folder / "long.md").write_text(long)
    (folder / "short.txt").write_text("The emergency brake is red.")
    (folder / "empty.txt").write_text("")
    (folder / "broken.json").write_text("{")
    (folder / "gone.txt").write_text("It will be gone.")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    (folder / "encoding.md").write_bytes(b"\xff\xff\xff")
    with (folder / "huge.log").open("wb") as huge:
        huge.truncate(MAX_FILE_BYTES + 1)
    seen: list[int] = []

    first = await build(store, folder, progress=lambda report: seen.append(report.files))
    again = await build(store, folder)

    assert counts(first) == (9, 0, 4, 0)
    failed = {Path(path).name: words for path, words in first.failed.items()}
    for name, words in {
        "broken.json": "no JSON", "binary.txt": "no text", "broken.pdf": "no PDF that can be read",
        "encoding.md": "encoding is not known", "huge.log": "100 MiB, at most 100",
    }.items():  # fmt: skip
        assert words in failed.pop(name)
    assert failed == {}
    assert first.embedded == first.chunks == (await store.status()).vectors > 20
    assert seen == [9] * 9
    assert (again.unchanged, again.embedded) == (3, 0)  # the empty file has nothing that could tell

    # A part is changed, a file is touched, one is gone, one is renamed, one is repaired.
    (folder / "long.md").write_text(long.replace("Sentence 7 says", "Sentence 7 tells"))
    os.utime(folder / "short.txt", ns=(1, 1))
    (folder / "gone.txt").unlink()
    (folder / "broken.json").write_text('{"colour": "green"}')
    for name in ("binary.txt", "broken.pdf", "encoding.md", "huge.log"):
        (folder / name).unlink()
    changed = await build(store, folder)

    assert (changed.unchanged, changed.removed, changed.failed) == (1, 1, {})
    assert 0 < changed.embedded <= 5 < changed.chunks
    assert await files(store) == {"long.md", "short.txt", "broken.json"}
    assert (await store.status()).chunks == (await store.status()).vectors
    told = await store.search("tells", mode="text")
    assert told.hits and all("Part 7" in hit.chunk.text or "tells" in hit.chunk.text for hit in told.hits)
    assert (await store.search("gone", mode="text")).hits == []
    # Other files of the same store are not this folder's.
    other = tmp_path / "other"
    other.mkdir()
    (other / "more.txt").write_text("More.")
    assert counts(await build(store, other)) == (1, 0, 1, 0)
    assert "long.md" in await files(store)


async def test_a_build_that_is_interrupted_is_gone_on_with(
    store: modelbus.AsyncStore, shared: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n:02}.txt").write_text("\n\n".join(f"file{n} paragraph {p} " + "word " * 100 for p in range(5)))
    done: list[int] = []
    interrupted = asyncio.create_task(build(store, folder, progress=lambda report: done.append(report.written)))
    while len(done) < 5:
        await asyncio.sleep(0.005)
    interrupted.cancel()
    await asyncio.gather(interrupted, return_exceptions=True)

    report = await build(store, folder)
    final = await build(store, folder)

    assert report.failed == {} and report.unchanged >= 1 and report.unchanged + report.written == 30
    assert (final.unchanged, final.written) == (30, 0)
    for n in (0, 12, 29):
        found = (await store.search(f"file{n}", mode="text", limit=50)).hits
        assert found and {Path(hit.chunk.file_id).name for hit in found} == {f"{n:02}.txt"}
    assert (await store.status()).chunks == (await store.status()).vectors


async def test_what_cannot_be_built_is_refused(store: modelbus.AsyncStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no folder"):
        await build(store, tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    report = await build(store, tmp_path)
    assert report.failed == {str(tmp_path / "caf\ufffd.txt"): "its name is no UTF-8: rename it"} and report.written == 1
    assert msgspec.json.decode(msgspec.json.encode(report), type=BuildReport) == report  # as the command prints it
    client = store._client
    with pytest.raises(InvalidRequest, match="'emb', not with 'other'"):
        await build(modelbus.AsyncStore("kb", client=client, embedding_model="other"), tmp_path)
    with pytest.raises(InvalidRequest, match="'emb', not with 'other'"):
        await modelbus.AsyncStore("kb", client=client, embedding_model="other").search("x")
    with pytest.raises(ModelNotFound, match="missing"):
        await build(modelbus.AsyncStore("kb2", client=client, embedding_model="missing"), tmp_path)
    await modelbus.AsyncStore("kb2", client=client).drop()


async def test_the_seeds_own_question_finds_the_right_file_and_the_answer_gets_it(
    store: modelbus.AsyncStore, tmp_path: Path
) -> None:
    folder = tmp_path / "doc_repo"
    right = folder / "deploy_models" / "run.txt"
    right.parent.mkdir(parents=True)
    # Its answer, as the document's author has it; our copy of the document is of its commands alone.
    right.write_text(
        document().read_text() + "\n\n## 向量模型\n\n使用 byzerllm 部署 gpt 的向量模型，模型名字叫 gpt_emb：\n\n"
        "byzerllm deploy --pretrained_model_type saas/openai \\\n"
        "--infer_params saas.api_key=${MODEL_OPENAI_TOKEN} saas.model=text-embedding-3-small \\\n--model gpt_emb\n"
    )
    (folder / "cooking.md").write_text("# 做饭\n\n如何通过大火做一个好吃的菜，名字叫红烧肉。\n" * 20)
    (folder / "english.txt").write_text("How to bake bread, and what its name is. " * 30)
    await build(store, folder)
    question = "如何通过 byzerllm 部署 gpt 的向量模型，模型名字叫 gpt_emb "

    found = await contexts([store], question)

    assert str(right) in {context.file for context in found}
    # By its words alone the best passages are its, and among them the one with the command: echo's vectors mean nothing.
    by_text = await store.search(question, mode="text", limit=6)
    assert by_text.hits[0].chunk.file_id == str(right)
    assert any("--model gpt_emb" in hit.chunk.text for hit in by_text.hits if hit.chunk.file_id == str(right))
    assert [context.number for context in found] == list(range(1, len(found) + 1))
    client = store._client
    assert client is not None
    async with answer(client, "emb", question, found) as stream:  # echo says what it was asked
        said = "".join([delta.text async for delta in stream])
    assert f"[1] {found[0].place}" in said and found[0].text in said and question in said
    # A question that refers to what was said is looked for as the model has rewritten it; echo says what it was told.
    history = [{"role": "user", "content": "What colour is the brake?"}, {"role": "assistant", "content": "Red."}]
    alone = await standing_alone(client, "emb", "And where is it?", history)
    assert "What colour is the brake?" in alone and alone.endswith("And where is it?")
    assert await standing_alone(client, "emb", question, []) == question


async def test_a_terminal_shows_a_bar_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, shown = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(shown, "w") as screen, open(os.devnull, "w") as nothing:
        for error_output in (nothing, screen):
            monkeypatch.setattr("sys.stderr", error_output)
            with _bar() as progress:
                progress(BuildReport(files=4, unchanged=1, written=1, failed={"a": "no text"}, chunks=7))
    said = b""
    with contextlib.suppress(OSError):  # EIO: all was read, and nobody writes any more
        while piece := os.read(terminal, 1 << 16):
            said += piece
    os.close(terminal)
    assert b"building, 7 chunks" in said and b"3/4" in said
