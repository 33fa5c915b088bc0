"""The command line with real processes: a bus, a node, workers and a gateway of each test's own."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import modelbus as sdk
import pytest
from modelbus.errors import ModelNotFound
from modelbus_broker import names
from modelbus_broker.asking import CallOptions
from modelbus_broker.buckets import Bucket
from modelbus_broker.connection import Bus
from modelbus_broker.settings import bus_settings
from modelbus_broker.topology import queued

from tests.helpers.adapters import empty_adapter
from tests.helpers.command_line import SCRIPTS, Ran, environment, free_port, modelbus, modelbus_ok, processes_of

ECHO = ("--pretrained_model_type", "echo")


@pytest.fixture
def head(isolated_home: Path) -> Iterator[Path]:
    """A bus and a node on this host, by `modelbus start --head`."""
    modelbus_ok("start", "--head")
    yield isolated_home
    modelbus("stop")
    assert processes_of(isolated_home) == []


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """`modelbus serve` while the context lasts; gives its URL."""
    port = free_port()
    process = subprocess.Popen(
        [str(SCRIPTS / "modelbus"), "serve", "--port", str(port), *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        end = time.monotonic() + 30
        while True:
            try:
                opener.open(f"{url}/health/ready", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "the gateway does not come up"
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(40) in (0, 130, -signal.SIGINT)


async def trace_of(model: str) -> list[str]:
    """What the bus still holds of a model: records, claims, failures, consumers, messages."""
    left = []
    async with await Bus.connect(bus_settings(), name="test") as bus:
        key = names.deployment_key(model)
        for bucket in (names.BUCKET_DEPLOYMENTS, names.BUCKET_CLAIMS, names.BUCKET_FAILURES):
            entries = await Bucket(bus, bucket).all()
            left += [
                f"{bucket}/{name}" for name, entry in entries.items() if name.startswith(key) and not entry.deleted
            ]
        for name, entry in (await Bucket(bus, names.BUCKET_WORKERS).all()).items():
            if not entry.deleted and model.encode() in entry.value:
                left.append(f"workers/{name}")
        for stream in names.LANE_STREAMS.values():
            consumers = await bus.js_request(f"CONSUMER.NAMES.{stream}")
            left += [name for name in consumers["consumers"] or [] if name.startswith(names.model_token(model))]
        left += ["messages"] * await queued(bus, model)
    return left


def files_with(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_one_command_starts_a_bus_and_a_node_and_another_stops_both(isolated_home: Path) -> None:
    assert modelbus("status").code == 3
    assert modelbus("stop").code == 3

    started = modelbus_ok("start", "--head")
    again = modelbus("start", "--head")
    status = modelbus_ok("status").json()
    stopped = modelbus_ok("stop")

    assert "127.0.0.1" in started.out
    assert again.code == 1 and "modelbus stop" in again.err
    assert [node["engines"][0] for node in status["nodes"]] == ["echo"]
    assert "stopping" in stopped.err
    assert modelbus("status").code == 3
    assert processes_of(isolated_home) == []
    assert not (isolated_home / "bus.json").exists()


def test_what_is_deployed_survives_a_restart_of_the_host_s_bus(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "chat")

    modelbus_ok("stop")
    modelbus_ok("start", "--head")

    end = time.monotonic() + 60
    while (asked := modelbus("query", "--model", "chat", "--query", "still there")).code != 0:
        assert time.monotonic() < end, asked.err
        time.sleep(0.5)
    assert asked.out == "still there\n"


def test_a_model_is_deployed_asked_counted_listed_and_undeployed(head: Path, tmp_path: Path) -> None:
    deployed = modelbus_ok("deploy", *ECHO, "--num_workers", "2", "--worker-concurrency", "3", "--model", "chat").json()
    asked = modelbus_ok("query", "--model", "chat", "--query", "hello, who are you?")
    written = modelbus_ok("query", "--model", "chat", "--query", "Grüße", "--output_file", str(tmp_path / "a.txt"))
    stat = modelbus_ok("stat", "--model", "chat").json()
    listed = modelbus_ok("models").json()
    logs = modelbus_ok("logs", "chat", "-n", "5").json()
    undeployed = modelbus_ok("undeploy", "--model", "chat").json()

    assert (deployed["workers"], deployed["engine"], deployed["replaced"]) == (2, "echo", False)
    assert asked.out == "hello, who are you?\n"
    assert (written.out, (tmp_path / "a.txt").read_text()) == ("", "Grüße")
    assert list(stat) == [
        "total_workers", "busy_workers", "idle_workers", "load_balance_strategy", "total_requests", "state",
        "worker_max_concurrency", "workers_last_work_time",
    ]  # fmt: skip
    assert (stat["total_workers"], stat["worker_max_concurrency"]) == (2, 3)
    assert [(row["model"], row["workers"], row["wanted"]) for row in listed] == [("chat", 2, 2)]
    assert sorted(worker["replica"] for answer in logs for worker in answer["workers"]) == [0, 1]
    assert undeployed["dropped"] == 0
    assert modelbus_ok("models").json() == []
    assert asyncio.run(trace_of("chat")) == []
    assert modelbus("query", "--model", "chat", "--query", "x").code == 4


def test_an_embedding_model_answers_with_its_vector(head: Path) -> None:
    # A model of embeddings alone: our own gateway, asked as a provider.
    modelbus_ok("deploy", *ECHO, "--model", "upstream", "--infer_params", "dimensions=4")
    with serving() as url:
        modelbus_ok(
            "deploy", "--pretrained_model_type", "saas/vllm", "--model", "emb",
            "--infer_params", "saas.model=upstream", f"saas.base_url={url}/v1", "saas.task=embedding",
        )  # fmt: skip
        vector = modelbus_ok("query", "--model", "emb", "--query", "text").json()

    assert len(vector) == 4 and all(isinstance(number, float) for number in vector)


def test_the_gateway_serves_what_is_deployed_and_wants_its_key(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "chat")
    with serving("--api_key", "sk-gateway") as url:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-gateway"}
        with opener.open(urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=20) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        with pytest.raises(OSError, match="401"):
            opener.open(f"{url}/v1/models", timeout=20)

    assert text == "hi"
    assert files_with(head, "sk-gateway") == []


SECRET = "sk-very-secret-value"


#: infer_params of a deploy, its exit code and what it must say.
BROKEN: list[tuple[str, tuple[str, ...], int, str]] = [
    ("saas/openai", ("saas.model=m", "saas.base_url=http://127.0.0.1:9/v1", f"saas.api_key={SECRET}"), 1, "cannot be reached"),
    ("saas/nobody", ("saas.model=m", f"saas.api_key={SECRET}"), 1, "nobody"),
    ("saas/openai", ("saas.model=m", "saas.api_key="), 2, "env:NAME"),
    ("saas/openai", ("saas.model=m", "saas.api_key=env:NOT_SET_ANYWHERE"), 1, "NOT_SET_ANYWHERE"),
    ("saas/openai", ("saas.model=m", "saas.api_key=file:/not/there"), 1, "/not/there"),
    ("saas/openai", ("saas.nonsense=1", f"saas.api_key={SECRET}"), 1, "nonsense"),
    ("nonsense", (), 1, "nonsense"),
    ("echo", ("start_error=the weights are damaged",), 1, "the weights are damaged"),
    ("echo", ("fail=always",), 1, "fail"),
]  # fmt: skip


def test_a_deploy_that_cannot_work_says_why_and_leaves_nothing(head: Path) -> None:
    for kind, params, code, words in BROKEN:
        given = ["--infer_params", *params] if params else []
        ran = modelbus("deploy", "--model", "broken", "--pretrained_model_type", kind, *given)

        assert (ran.code, words in ran.err) == (code, True), (kind, params, ran.err)
        assert asyncio.run(trace_of("broken")) == [], (kind, params)
        assert SECRET not in ran.out + ran.err
    assert modelbus_ok("models").json() == []
    assert files_with(head, SECRET) == []


#: Flags of a deploy that no node can take, and what it must say.
NO_ROOM = [
    (("--pretrained_model_type", "custom/auto", "--model_path", "/not/there"), "/not/there"),
    (("--pretrained_model_type", "custom/auto", "--infer_backend", "llama_cpp", "--model_path", "/"), "llama_cpp"),
    ((*ECHO, "--require", "disk=ssd"), "disk=ssd"),
    ((*ECHO, "--gpus_per_worker", "64"), "GPU"),
    ((*ECHO, "--memory_mb", "999999999"), "memory"),
]


def test_a_deploy_without_room_says_what_is_short(head: Path) -> None:
    for flags, words in NO_ROOM:
        ran = modelbus("deploy", "--model", "broken", *flags)

        assert (ran.code, words in ran.err) == (1, True), (flags, ran.err)
        assert asyncio.run(trace_of("broken")) == [], flags


def test_an_engine_whose_library_is_missing_says_which_extra_brings_it(
    isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An engine of a distribution of its own, as somebody else would ship one.
    (tmp_path / "heavy-1.0.dist-info").mkdir()
    (tmp_path / "heavy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1.0\n")
    entry_point = "[modelbus.engines]\nheavy = heavy_engine:HeavyEngine\n"
    (tmp_path / "heavy-1.0.dist-info" / "entry_points.txt").write_text(entry_point)
    (tmp_path / "heavy_engine.py").write_text(
        "from modelbus_workers.engines.echo import EchoEngine\n"
        "class HeavyEngine(EchoEngine):\n"
        "    name, extra, needs = 'heavy', 'heavy', ('a_library_that_nobody_has',)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modelbus_ok("start", "--head")
    try:
        ran = modelbus("deploy", "--model", "broken", "--pretrained_model_type", "heavy")

        assert ran.code == 1
        assert "a_library_that_nobody_has" in ran.err and "modelbus[heavy]" in ran.err
        assert asyncio.run(trace_of("broken")) == []
    finally:
        modelbus("stop")


def test_a_provider_s_own_words_about_a_wrong_key_or_model_reach_the_user(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "upstream")
    with serving("--api-key", "sk-right-key") as url:
        for key, model, words in (("sk-wrong-key", "upstream", "API key"), ("sk-right-key", "gone", "'gone'")):
            ran = modelbus(
                "deploy", "--model", "broken", "--pretrained_model_type", "saas/openai",
                "--infer_params", f"saas.model={model}", f"saas.api_key={key}", f"saas.base_url={url}/v1",
            )  # fmt: skip

            assert (ran.code, words in ran.err) == (1, True), ran.err
            assert asyncio.run(trace_of("broken")) == []
            assert files_with(head, key) == []


def test_a_secret_is_sealed_and_a_worker_gets_it(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "upstream")
    with serving("--api-key", SECRET) as url:
        ran = modelbus_ok(
            "deploy", "--model", "proxy", "--pretrained_model_type", "saas/openai",
            "--infer_params", "saas.model=upstream", f"saas.api_key={SECRET}", f"saas.base_url={url}/v1",
        )  # fmt: skip
        asked = modelbus_ok("query", "--model", "proxy", "--query", "through two queues")
        seen = [modelbus_ok(*command).out for command in (["status"], ["models"], ["logs", "proxy"])]

    assert asked.out == "through two queues\n"
    assert all(SECRET not in text for text in [*seen, ran.out, ran.err])
    assert files_with(head, SECRET) == []


def test_a_redeploy_replaces_what_ran_and_one_that_fails_restores_it(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "chat", "--infer_params", "text=first")
    replaced = modelbus_ok("deploy", *ECHO, "--model", "chat", "--infer_params", "text=second").json()
    second = modelbus_ok("query", "--model", "chat", "--query", "x").out

    failed = modelbus("deploy", *ECHO, "--model", "chat", "--infer_params", "text=third", "start_error=no third")
    after = modelbus_ok("query", "--model", "chat", "--query", "x").out

    assert replaced["replaced"] is True
    assert (second, after) == ("second\n", "second\n")
    assert failed.code == 1 and "no third" in failed.err


def test_ctrl_c_during_a_deploy_takes_it_back(head: Path) -> None:
    command = [str(SCRIPTS / "modelbus"), "deploy", *ECHO, "--model", "slow", "--infer_params", "start_delay_ms=60000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    while "starting" not in process.stderr.readline():
        assert process.poll() is None

    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)

    assert (process.returncode, "Interrupted" in words) == (130, True), words
    assert asyncio.run(trace_of("slow")) == []


async def one_running_one_waiting(client: sdk.Client) -> list[asyncio.Task[sdk.ChatAnswer]]:
    """Two long requests for a worker with one slot: one runs, one may lie at the worker, the others wait."""
    tasks = [
        asyncio.create_task(client.chat("chat", "go on", options=CallOptions(stream=False, budget_ms=90_000)))
        for _ in range(4)
    ]
    async with asyncio.timeout(30):
        while not await queued(client.bus, "chat"):
            await asyncio.sleep(0.1)
    return tasks


async def test_undeploy_refuses_while_requests_wait_and_drop_ends_them(head: Path) -> None:
    slow = ("--infer_params", "interval_ms=100", "tokens=100")
    await asyncio.to_thread(modelbus_ok, "deploy", *ECHO, "--model", "chat", "--worker_concurrency", "1", *slow)
    async with sdk.connect() as client:
        tasks = await one_running_one_waiting(client)

        refused: Ran = await asyncio.to_thread(modelbus, "undeploy", "--model", "chat")
        dropped = (await asyncio.to_thread(modelbus_ok, "undeploy", "--model", "chat", "--drop")).json()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    assert refused.code == 1 and "--drain" in refused.err
    assert dropped["dropped"] >= 1
    assert sum(isinstance(answer, ModelNotFound) for answer in answers) == dropped["dropped"]
    assert await trace_of("chat") == []


async def test_undeploy_can_serve_what_waits_first(head: Path) -> None:
    slow = ("--infer_params", "interval_ms=20", "tokens=20")
    await asyncio.to_thread(modelbus_ok, "deploy", *ECHO, "--model", "chat", "--worker_concurrency", "1", *slow)
    async with sdk.connect() as client:
        tasks = await one_running_one_waiting(client)

        await asyncio.to_thread(modelbus_ok, "undeploy", "--model", "chat", "--drain")
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 60)

    assert [answer.finish_reason for answer in answers] == ["length"] * 4 or all(answer.text for answer in answers)
    assert await trace_of("chat") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "80000"], "1 to 65535"),
        (["start"], "--head"),
        (["start", "--head", "--address", "nats://127.0.0.1:1"], "--head"),
        (["deploy"], "--model"),
        (["deploy", "--model", "m", "--infer_params", "no-equals"], "KEY=VALUE"),
        (["deploy", "--model", "m", *ECHO, "--num_workers", "0"], "--num_workers"),
        (["undeploy", "--model", "m", "--drain", "--drop"], "--drop"),
        (["query", "--model", "m"], "--query"),
        (["nonsense"], "nonsense"),
        (["models", "--address", "http://x"], "nats://HOST:PORT"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(arguments: list[str], words: str) -> None:
    ran = modelbus(*arguments)

    assert (ran.code, words in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("command", [["models"], ["stat"], ["deploy", "--model", "m", *ECHO], ["logs", "m"], ["serve"]])
def test_without_a_bus_every_command_exits_with_3_and_says_how_to_start_one(command: list[str]) -> None:
    ran = modelbus(*command)

    assert (ran.code, "modelbus start --head" in ran.err) == (3, True), ran.err


def test_the_shell_can_complete_commands_and_flags() -> None:
    script = modelbus_ok("completion", "bash")
    completed = modelbus(
        "", env={"_MODELBUS_COMPLETE": "bash_complete", "COMP_WORDS": "modelbus und", "COMP_CWORD": "1"}
    )

    assert "_MODELBUS_COMPLETE=bash_complete" in script.out
    assert "undeploy" in completed.out


def test_the_version_is_printed() -> None:
    assert modelbus_ok("version").out.strip() == sdk.__version__


def test_dead_letters_are_listed_shown_replayed_and_dropped(head: Path) -> None:
    modelbus_ok("deploy", *ECHO, "--model", "chat", "--infer_params", "fail=every:2", "fail_text=out of luck")
    # The first request was the deploy's own.
    asked = [modelbus("query", "--model", "chat", "--query", word).code for word in ("one", "fine", "two")]
    assert asked == [1, 0, 1]

    first, second = modelbus_ok("dead", "list").json()
    shown = modelbus_ok("dead", "show", first["id"]).json()
    replayed = modelbus_ok("dead", "replay", first["id"]).json()
    left = modelbus_ok("dead", "list", "--model", "chat").json()

    assert (first["reason"], first["model"], len(first["runs"])) == ("engine_failed", "chat", 1)
    assert "out of luck" in first["detail"]
    assert shown["request"]["task"]["messages"][0]["content"] == "one"
    assert replayed["answers"] == ["one"] and replayed["replays"] == first["id"] != replayed["id"]
    assert left == [second]
    assert modelbus("dead", "replay", first["id"]).code == 4
    assert modelbus("dead", "drop").code == 2
    assert modelbus_ok("dead", "drop", str(second["number"])).json() == {"dropped": 1}
    assert modelbus_ok("dead", "drop", "--all").json() == {"dropped": 0}


def test_adapters_come_and_go_while_a_model_runs(head: Path, tmp_path: Path) -> None:
    folder = str(empty_adapter(tmp_path / "pirate"))
    modelbus_ok("deploy", *ECHO, "--infer_params", "backend.adapters=true", "--model", "chat")
    added = modelbus_ok("adapters", "add", "chat", "pirate", folder).json()
    assert (added["model"], added["name"], added["path"]) == ("chat", "pirate", folder)
    assert modelbus_ok("query", "--model", "chat:pirate", "--query", "ahoy").out.strip() == "[pirate] ahoy"
    assert modelbus_ok("adapters", "add", "chat", "pirate", folder, "--replace").json()["path"] == folder
    missing = modelbus("adapters", "add", "chat", "cook", str(tmp_path / "none"))
    assert missing.code == 1 and f"on host {socket.gethostname()}: there is no folder" in missing.err
    assert [item["name"] for item in modelbus_ok("adapters", "list", "chat").json()] == ["pirate"]
    modelbus_ok("adapters", "remove", "chat", "pirate")
    unknown = modelbus("query", "--model", "chat:pirate", "--query", "ahoy")
    assert unknown.code == 4 and "has no adapter 'pirate'" in unknown.err

    # Whoever takes a model down takes its adapters with it.
    modelbus_ok("adapters", "add", "chat", "pirate", folder)
    modelbus_ok("undeploy", "--model", "chat")
    assert asyncio.run(adapters_left()) == []


async def adapters_left() -> list[str]:
    async with await Bus.connect(bus_settings(), name="test") as bus:
        entries = await Bucket(bus, names.BUCKET_ADAPTERS).all()
        return [key for key, entry in entries.items() if not entry.deleted]
