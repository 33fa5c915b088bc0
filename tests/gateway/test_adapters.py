"""Adapters by name: added, asked for, listed and removed over a real bus, with real workers and real clients."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from pathlib import Path

import aiohttp
import modelbus
import msgspec
import openai
import pytest
from modelbus.answers import collect
from modelbus.model_client import chat_task
from modelbus_broker.buckets import Bucket
from modelbus_broker.dead import letters, replay
from modelbus_broker.errors import (
    AdapterUnavailable,
    Conflict,
    EngineFailed,
    InvalidRequest,
    ModelBusError,
    ModelNotFound,
    ModelUnavailable,
    UnsupportedField,
)
from modelbus_broker.messages import Delta, encode
from modelbus_broker.names import BUCKET_ADAPTERS, adapter_key

from tests.gateway.conftest import StartGateway
from tests.helpers.adapters import empty_adapter
from tests.helpers.asking import settled, usage_events
from tests.helpers.cluster import Cluster, echo_deployment

HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]
HOST = socket.gethostname()


async def test_a_name_with_an_adapter_is_asked_like_a_model(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await cluster.deploy_echo("echo:7b", workers=2, adapters="true")
    await cluster.deploy_echo("plain")
    url = await start_gateway(served_model_names={"small": "echo:7b"})
    pirate, poet = empty_adapter(tmp_path / "pirate"), empty_adapter(tmp_path / "poet", note="another")

    async with (
        modelbus.connect(cluster.server.url) as client,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as asking,
    ):
        added = await client.add_adapter("echo:7b", "pirate", str(pirate))
        await client.add_adapter("echo:7b", "poet", str(poet))
        assert [(item.name, item.path) for item in await client.adapters("echo:7b")] == [
            ("pirate", str(pirate)), ("poet", str(poet)),
        ]  # fmt: skip
        assert len(added.fingerprint) == 16
        async with asyncio.timeout(20):
            while not (found := [card for card in (await asking.models.list()).data if card.id == "echo:7b:poet"]):
                await asyncio.sleep(0.05)
        assert found[0].model_dump()["parent"] == "echo:7b"
        names = [card.id for card in (await asking.models.list()).data]
        assert names == ["echo:7b", "echo:7b:pirate", "echo:7b:poet", "plain", "small"]
        assert (await asking.models.retrieve("echo:7b:pirate")).created == added.created_ms // 1000

        for name, text in {"echo:7b:pirate": "[pirate] ", "small:poet": "[poet] ", "echo:7b": "", "small": ""}.items():
            answer = await asking.chat.completions.create(model=name, messages=HELLO)
            assert (answer.choices[0].message.content, answer.model) == (f"{text}hello there", name)
        chunks = [
            chunk.choices[0].delta.content or ""
            async for chunk in await asking.chat.completions.create(model="echo:7b:poet", messages=HELLO, stream=True)
        ]
        assert "".join(chunks) == "[poet] hello there"
        assert (await client.chat("echo:7b:pirate", "ahoy")).text == "[pirate] ahoy"
        assert client.capabilities("echo:7b:pirate") == client.capabilities("echo:7b") != client.capabilities("plain")
        async with client.stream("echo:7b:poet", "o rose") as stream:
            assert "".join([delta.text async for delta in stream]) == "[poet] o rose"

        with pytest.raises(openai.NotFoundError, match=r"no adapter 'cook' \(it has: pirate, poet\)") as unknown:
            await asking.chat.completions.create(model="echo:7b:cook", messages=HELLO)
        assert unknown.value.code == "model_not_found"
        # Its workers may have been replaced by such as take none.
        record = msgspec.structs.replace(added, model="plain")
        await Bucket(cluster.bus, BUCKET_ADAPTERS).put(adapter_key("plain", "pirate"), encode(record))
        async with asyncio.timeout(20):
            while "plain:pirate" not in [card.id for card in (await asking.models.list()).data]:
                await asyncio.sleep(0.05)
        with pytest.raises(openai.BadRequestError, match="'model' is not supported by the model 'plain:pirate'"):
            await asking.chat.completions.create(model="plain:pirate", messages=HELLO)

        # Under one key another adapter is another question.
        headers = {"Idempotency-Key": "one"}
        for name, status in {"echo:7b:pirate": 200, "small:pirate": 200, "echo:7b:poet": 409}.items():
            body = {"model": name, "messages": HELLO}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == status, await response.text()

        await client.remove_adapter("echo:7b", "poet")
        with pytest.raises(ModelNotFound, match="it has: pirate"):
            await client.chat("echo:7b:poet", "gone")
        await settled(cluster.bus, "echo:7b")
        booked = {event.adapter for event in await usage_events(cluster.bus) if event.outcome == "done"}
        assert booked == {"pirate", "poet", ""}


async def test_what_cannot_be_added_is_said_with_the_host(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.deploy_echo("echo", adapters="true")
    await cluster.deploy_echo("plain")
    await cluster.declare(echo_deployment("later"))
    good, changed = empty_adapter(tmp_path / "good"), empty_adapter(tmp_path / "changed")
    pickled, cut, prompt = (empty_adapter(tmp_path / name) for name in ("pickled", "cut", "prompt"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (cut / "adapter_model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (prompt / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    wrong: list[tuple[str, str, str, type[ModelBusError], str]] = [
        ("echo", "a", str(tmp_path / "none"), InvalidRequest, f"on host {HOST}: there is no folder"),
        ("echo", "a", str(pickled), InvalidRequest, "adapter_model.bin, which may run code"),
        ("echo", "a", str(cut), InvalidRequest, "no safetensors file, or not all of it"),
        ("echo", "a", str(prompt), InvalidRequest, "peft_type is 'PREFIX_TUNING'"),
        ("echo", "a:b", str(good), InvalidRequest, "is no name for an adapter"),
        ("echo", "a", "", InvalidRequest, "needs the path"),
        ("plain", "a", str(good), UnsupportedField, r"takes no adapters: plain \(echo\)"),
        ("later", "a", str(good), ModelUnavailable, "no worker of 'later' is ready"),
        ("nobody", "a", str(good), ModelNotFound, "not deployed"),
    ]
    async with modelbus.connect(cluster.server.url) as client:
        for model, name, path, kind, words in wrong:
            with pytest.raises(kind, match=words):
                await client.add_adapter(model, name, path)
        assert await client.adapters() == []
        first = await client.add_adapter("echo", "a", str(changed))
        with pytest.raises(Conflict, match="has an adapter 'a'"):
            await client.add_adapter("echo", "a", str(good))
        assert (await client.chat("echo:a", "hi")).text == "[a] hi"

        # Who trains on writes other weights to the same place: they are not taken for those that were added.
        empty_adapter(changed, note="of the next day")
        with pytest.raises(AdapterUnavailable, match=f"on host {HOST}: the files at .* add it again"):
            await client.chat("echo:a", "hi")
        second = await client.add_adapter("echo", "a", str(changed), replace=True)
        assert second.fingerprint != first.fingerprint
        assert (await client.chat("echo:a", "hi")).text == "[a] hi"


async def test_an_answer_goes_on_elsewhere_with_its_adapter(cluster: Cluster, tmp_path: Path) -> None:
    workers = await cluster.deploy_echo("echo", workers=2, adapters="true", tokens="60", interval_ms="20")
    folder = empty_adapter(tmp_path / "pirate")
    async with modelbus.connect(cluster.server.url) as client:
        await client.add_adapter("echo", "pirate", str(folder))
        whole = (await client.chat("echo:pirate", "yo ho")).text
        assert whole.startswith("[pirate] yo ho [pirate] yo")
        text, killed = "", False
        call = await client.publisher.submit("echo:pirate", chat_task("yo ho", {}))
        async for batch in call.batches():
            for frame in batch:
                text += frame.text if isinstance(frame, Delta) else ""
            if len(text) > 40 and not killed:
                (worker,) = [worker for worker in workers if call.reception.run.endswith(worker.id)]
                worker.send_signal(signal.SIGKILL)
                await client.remove_adapter("echo", "pirate")  # the name; what runs ends with it
                killed = True
        assert call.attempt.attempt == 2
        assert text == whole


async def test_a_dead_letter_is_replayed_with_its_adapter(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.deploy_echo("echo", adapters="true", fail="first:1")
    async with modelbus.connect(cluster.server.url) as client:
        await client.add_adapter("echo", "pirate", str(empty_adapter(tmp_path / "pirate")))
        with pytest.raises(EngineFailed):
            await client.chat("echo:pirate", "yo ho")
        async with asyncio.timeout(20):
            while not (found := [letter async for letter in letters(cluster.bus)]):
                await asyncio.sleep(0.05)
        answer = await collect(await replay(client.publisher, found[0]))
        assert answer.choices[0].text == "[pirate] yo ho"


async def test_users_of_vllm_load_and_unload_as_they_know_it(
    cluster: Cluster, start_gateway: StartGateway, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await cluster.deploy_echo("echo", adapters="true")
    closed, url = await start_gateway(), await start_gateway(allow_adapter_updates=True)
    path = str(empty_adapter(tmp_path / "sql"))

    async def post(route: str, to: str = url, **body: str | bool) -> tuple[int, str]:
        async with http.post(f"{to}/v1/{route}", json=body) as response:
            return response.status, await response.text()

    assert (await post("load_lora_adapter", closed, lora_name="sql", lora_path=path))[0] == 404
    assert await post("load_lora_adapter", lora_name="sql", lora_path=path) == (
        200, "Success: LoRA adapter 'sql' added successfully: its name is 'echo:sql'.",
    )  # fmt: skip
    assert (await post("load_lora_adapter", lora_name="echo:sql", lora_path=path))[0] == 409
    assert (await post("load_lora_adapter", lora_name="echo:sql", lora_path=path, load_inplace=True))[0] == 200
    status, text = await post("load_lora_adapter", lora_name="other", lora_path=str(tmp_path / "none"))
    assert (status, json.loads(text)["error"]["param"]) == (400, "path") and HOST in text
    assert (await post("load_lora_adapter", lora_name="other"))[0] == 400
    body = {"model": "echo:sql", "messages": HELLO}
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "[sql] hello there"
    assert (await post("unload_lora_adapter", lora_name="sql"))[0] == 200
    assert (await post("unload_lora_adapter", lora_name="sql"))[0] == 404
