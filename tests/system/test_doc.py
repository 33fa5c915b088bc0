"""`modelbus doc` with real processes: a folder becomes a collection, a question gets an answer with its sources."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import modelbus as sdk
import pytest
from modelbus.errors import NotFound
from modelbus.knowledge.judging import Relevance, relevances
from modelbus.knowledge.recall import _ASK
from modelbus.structure import Ladder, Result, answer

from tests.helpers.command_line import SCRIPTS, environment, modelbus, modelbus_ok
from tests.helpers.heads import minilm
from tests.helpers.seed_document import doc_command, document
from tests.helpers.smollm2 import smollm2

QUESTION = "What colour is the emergency brake?"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A host with a search service, two echo models, and two real ones under the names that the document has."""
    home = tmp_path_factory.mktemp("home")
    at = {"MODELBUS_HOME": str(home)}

    def real(model: str, path: Path) -> None:
        # Like the document's, and with few requests at once: the machine has few CPUs.
        modelbus_ok(
            "deploy", "--pretrained_model_type", "custom/auto", "--model", model, "--model_path", str(path), env=at
        )

    modelbus_ok("start", "--head", env=at)
    try:
        modelbus_ok("storage", "start", env=at)
        with ThreadPoolExecutor() as pool:
            deploying = [pool.submit(real, *pair) for pair in (("gpt_emb", minilm()), ("gpt3_5_chat", smollm2()))]
            for model in ("chat", "emb"):
                modelbus_ok("deploy", "--pretrained_model_type", "echo", "--model", model, env=at)
        for deployed in deploying:
            deployed.result()
        yield home
    finally:
        modelbus("stop", env=at)


@pytest.fixture(autouse=True)
def isolated_home(host: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All tests here are on that host."""
    monkeypatch.setenv("MODELBUS_HOME", str(host))
    yield host
    sdk.disconnect()


def test_a_folder_is_built_and_asked(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "bus.md").write_text("# Bus\n\n## Brakes\n\nThe emergency brake is red.\n")
    (folder / "zh.md").write_text("# 部署\n\n用 modelbus 部署一个模型。\n")
    (folder / "broken.json").write_text("{")
    where = str((folder / "bus.md").resolve())
    built = modelbus(
        "doc", "build", "--source_dir", str(folder), "--model", "chat", "--emb_model", "emb", "--required_exts", ".md,json"
    )  # fmt: skip
    assert {name: built.json()[name] for name in ("files", "written", "unchanged")} == {
        "files": 3,
        "written": 2,
        "unchanged": 0,
    }
    assert built.code == 5 and "broken.json: it is no JSON" in built.err
    again = modelbus_ok(
        "doc", "build", "--source_dir", str(folder), "--emb_model", "emb", "--required_exts", "md"
    ).json()
    assert (again["unchanged"], again["embedded"]) == (2, 0)

    asked = modelbus_ok("doc", "query", "--model", "chat", "--emb_model", "emb", "--query", QUESTION)
    response, _, contexts = asked.out.partition("=============CONTEXTS==================")
    assert response.startswith("=============RESPONSE==================")
    # The model, which says what it was told, was told the documents and the question.
    assert "The emergency brake is red." in response and QUESTION in response
    assert f"{where}:1-5  Bus" in contexts

    found = modelbus_ok("doc", "query", "--query", QUESTION, "--contexts_only", "--json").json()
    assert found["response"] == "" and where in {context["file"] for context in found["contexts"]}
    other = modelbus("doc", "query", "--emb_model", "other", "--model", "chat", "--query", QUESTION)
    assert other.code == 1 and "'emb', not with 'other'" in other.err
    talk = subprocess.run(
        [str(SCRIPTS / "modelbus"), "doc", "chat", "--model", "chat"], input=f"{QUESTION}\nAnd where is it?\n\n",
        capture_output=True, text=True, timeout=100, env=environment(),
    )  # fmt: skip
    assert talk.returncode == 0 and talk.stdout.count("=============CONTEXTS") == 2, talk.stderr
    assert "And where is it?" in talk.stdout.split("=============RESPONSE")[2]

    (listed,) = modelbus_ok("doc", "list").json()
    assert (listed["collection"], listed["files"], listed["embedding_model"]) == ("default", 2, "emb")
    assert listed["source_dir"] == str(folder.resolve())
    missing = modelbus("doc", "query", "--collections", "default,nothing", "--model", "chat", "--query", QUESTION)
    assert missing.code == 4 and "no store 'nothing'" in missing.err
    assert modelbus("doc", "build", "--source_dir", str(tmp_path / "x"), "--emb_model", "emb").code == 1
    assert modelbus("doc", "query", "--query", QUESTION).code == 2
    assert modelbus_ok("doc", "drop", "default", "--yes").json() == {"collection": "default", "chunks": 2}
    assert modelbus_ok("doc", "list").json() == []


def test_the_documents_own_question_is_answered_with_the_right_file_among_the_contexts(tmp_path: Path) -> None:
    right = tmp_path / "deploy_models" / "run.txt"
    right.parent.mkdir()
    right.write_text(
        "# 部署 gpt 的向量模型，模型名字叫 gpt_emb\n\nbyzerllm deploy --pretrained_model_type saas/openai \\\n--num_workers 1 \\\n"
        "--infer_params saas.api_key=${MODEL_OPENAI_TOKEN} saas.model=text-embedding-3-small \\\n--model gpt_emb\n"
    )
    (tmp_path / "byzerllm.md").write_text(document().read_text())
    (tmp_path / "cooking.md").write_text("# Soup\n\nBoil water, add salt.\n\n# Bread\n\nKnead the dough and bake it.\n")
    build, ask = doc_command("build"), doc_command("query")
    build[build.index("--source_dir") + 1] = str(tmp_path)

    # The embedding model takes 256 tokens: of longer chunks, such as the Chinese ones, it embeds parts.
    built = modelbus_ok(*build).json()
    answered = modelbus_ok(*ask, "--limit", "2", "--max-tokens", "24")
    english = sdk.KnowledgeBase().contexts("How do I make bread?", limit=1)
    served = modelbus_ok(
        "doc", "serve", "--model", "gpt3_5_chat", "--name", "docs", "--limit", "1", "--max-tokens", "8"
    )
    modelbus_ok("query", "--model", "docs", "--query", "How do I make bread?")

    assert (built["written"], built["failed"]) == (3, {}) and built["embedded"] == built["chunks"] > 3
    response, _, contexts = answered.out.partition("=============CONTEXTS==================")
    assert (
        response.startswith("=============RESPONSE==================") and len(response.split("\n", 1)[1].strip()) > 1
    )
    assert f"] {right}:1-" in contexts
    assert english[0].file == str(tmp_path / "cooking.md")
    assert served.json()["engine"] == "knowledge"
    modelbus_ok("undeploy", "--model", "docs", "--drain")
    modelbus_ok("doc", "drop", "default", "--yes")


def test_a_real_model_judges_documents_in_the_form_that_it_is_held_to(tmp_path: Path) -> None:
    """The small model judges as chance would; what is tested is that its judgements come, in their form, and are used."""
    for name, text in {"brake.md": "# Brake\n\nThe brake is red.\n", "tea.md": "# Tea\n\nTea is at nine.\n"}.items():
        (tmp_path / name).write_text(text)
    kb = sdk.KnowledgeBase("judged", embedding_model="emb")
    kb.build(tmp_path)

    asked = ("doc", "query", "--collections", "judged", "--query", QUESTION, "--recall", "model", "--contexts-only", "--json")  # fmt: skip
    contexts = modelbus_ok(*asked, "--recall-model", "gpt3_5_chat").json()["contexts"]

    async def judged() -> tuple[list[float], Result[Relevance]]:
        async with sdk.connect() as client:
            # It decides, and gives probabilities; a model that does not is held to its form by a grammar.
            likely = await relevances(client, "gpt3_5_chat", QUESTION, [text for _, text in texts], _ASK)
            told = await answer(client, "gpt3_5_chat", f"{QUESTION} Give a score.", Relevance, ladder=Ladder(reasks=0))
        return likely, told

    texts = [(str(tmp_path / name), f"{tmp_path / name}\n{(tmp_path / name).read_text().strip()}") for name in ("brake.md", "tea.md")]  # fmt: skip
    likely, told = asyncio.run(judged())
    taken = sorted(
        ((score, file) for (file, _), score in zip(texts, likely, strict=True) if score >= 0.5), reverse=True
    )
    assert len(set(likely)) == 2 and all(0 < score < 1 for score in likely)
    assert [context["file"] for context in contexts] == [file for _, file in taken]
    assert [context["score"] for context in contexts] == pytest.approx([score for score, _ in taken], abs=0.01)
    assert 0 <= told.value.score <= 10 and told.rung == "grammar" and told.usage.completion_tokens <= 12
    kb.drop()


def test_a_build_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path: Path) -> None:
    for n in range(60):
        (tmp_path / f"{n:02}.txt").write_text("\n\n".join(f"file{n} paragraph {p} " + "word " * 100 for p in range(6)))
    killed = sdk.KnowledgeBase("killed", embedding_model="emb")
    command = [str(SCRIPTS / "modelbus"), "doc", "build", "--source_dir", str(tmp_path), "--emb_model", "emb", "--collection", "killed"]  # fmt: skip
    seed = random.randrange(1 << 30)
    kills = 0
    for share in sorted(random.Random(seed).uniform(0.02, 0.95) for _ in range(4)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        while process.poll() is None and _chunks(killed) < share * 240:
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()

    last = killed.build(tmp_path)
    never = sdk.KnowledgeBase("never", embedding_model="emb")
    never.build(tmp_path)

    assert kills and last.failed == {} and last.unchanged + last.written == 60, seed
    left, right = (
        {chunk.id: (chunk.text, chunk.vector) for chunk in sdk.Store(name).chunks(vectors=True)}
        for name in ("killed", "never")
    )
    assert left == right and all(vector for _, vector in left.values()), seed
    assert (again := killed.build(tmp_path)).unchanged == 60 and again.embedded == 0, seed
    killed.drop()
    never.drop()


def _chunks(kb: sdk.KnowledgeBase) -> int:
    try:
        return kb.status().chunks
    except NotFound:
        return 0
