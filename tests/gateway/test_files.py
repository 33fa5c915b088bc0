"""`/v1/files` through the official client, over a real bus."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import openai
import pytest
import pytest_asyncio
from modelbus_broker import names
from modelbus_broker.blobs import ChunkWriter
from modelbus_broker.connection import Bus
from modelbus_broker.messages import encode
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from modelbus_broker.topology import declare_bus
from modelbus_gateway.files.store import BUS_LIMIT, FileStore
from modelbus_gateway.server import listening
from modelbus_gateway.settings import GatewaySettings, gateway_settings

from tests.helpers.command_line import free_port

together = pytest.mark.asyncio(loop_scope="module")


class Stand:
    """A bus with two gateways: one keeps files on the bus alone, one has a folder for large ones."""

    def __init__(self, bus: Bus, folder: Path, plain: openai.AsyncOpenAI, rooted: openai.AsyncOpenAI) -> None:
        self.bus, self.folder, self.plain, self.rooted = bus, folder, plain, rooted

    async def bytes_on_the_bus(self) -> int:
        info = await self.bus.js_request(f"STREAM.INFO.{names.object_stream(names.FILES)}")
        return int(info["state"]["bytes"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stand]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "root").mkdir()
    async with (
        EmbeddedServer(ServerSettings(store=folder / "nats")) as server,
        await Bus.connect(BusSettings(url=server.url), name="test") as bus,
    ):
        await declare_bus(bus)
        settings = GatewaySettings(bus=bus.settings, port=free_port(), shutdown_grace_s=2.0)
        rooted = GatewaySettings(
            bus=bus.settings, port=free_port(), shutdown_grace_s=2.0, files_root=str(folder / "root"),
            max_file_bytes=65 << 20,
        )  # fmt: skip
        async with (
            listening(settings),
            listening(rooted),
            openai.AsyncOpenAI(base_url=f"{settings.address}/v1", api_key="any", max_retries=0) as one,
            openai.AsyncOpenAI(base_url=f"{rooted.address}/v1", api_key="any", max_retries=0) as two,
        ):
            yield Stand(bus, folder / "root", one, two)


@pytest_asyncio.fixture(loop_scope="module")
async def stand(shared: Stand) -> AsyncIterator[Stand]:
    """Every test leaves nothing behind."""
    stand = shared
    yield stand
    async for file in stand.rooted.files.list():
        await stand.rooted.files.delete(file.id)
    assert (await stand.bytes_on_the_bus(), list(stand.folder.iterdir())) == (0, [])


@together
async def test_a_file_is_uploaded_listed_read_and_deleted(stand: Stand) -> None:
    client = stand.plain
    text = "部署一个大模型\n" * 30_000  # several chunks
    made = await client.files.create(file=("说明.md", text.encode()), purpose="assistants")
    assert (made.filename, made.bytes, made.purpose, made.object) == (
        "说明.md",
        len(text.encode()),
        "assistants",
        "file",
    )
    assert (made.status, made.expires_at) == ("processed", None)
    assert await client.files.retrieve(made.id) == made
    answer = await client.files.content(made.id)
    assert answer.text == text or answer.content == text.encode()
    # A page that somebody uploaded does not run as one of this host's.
    assert answer.response.headers["content-disposition"] == "attachment"

    empty = await client.files.create(file=("empty.txt", b""), purpose="user_data")
    assert (await stand.rooted.files.content(empty.id)).content == b""  # any gateway has it
    batch = await client.files.create(file=("b.jsonl", b"{}"), purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 86400
    brief = await client.files.create(
        file=("brief.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert brief.expires_at == brief.created_at + 3600

    everything = [file.id async for file in client.files.list(limit=1)]
    assert everything == [brief.id, batch.id, empty.id, made.id]  # four pages, the newest first
    assert [file.id async for file in client.files.list(order="asc", limit=3)] == everything[::-1]
    assert [file.id async for file in client.files.list(purpose="user_data")] == [brief.id, empty.id]

    deleted = await client.files.delete(made.id)
    assert (deleted.deleted, deleted.id) == (True, made.id)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=made.id):
            await call(made.id)


@together
async def test_what_cannot_be_meant_is_refused_and_leaves_nothing(stand: Stand) -> None:
    client = stand.plain
    for fields, param in (
        ({"purpose": "poetry"}, "purpose"),
        ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after[seconds]"),
        ({"purpose": "batch", "expires_after": {"anchor": "now", "seconds": 5000}}, "expires_after[anchor]"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.files.create(file=("a.txt", b"words " * 50_000), **fields)
        assert refused.value.param == param
    for query in ({"limit": 0}, {"order": "up"}, {"after": "file-none"}):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.files.list(**query)
        assert refused.value.param in query
    for unknown in ("file-none", "file.*", "file->"):
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(unknown)

    async with aiohttp.ClientSession(base_url=str(client.base_url)) as http:
        for body, words in (
            ({"json": {}}, "multipart/form-data"),
            ({"data": aiohttp.FormData({"purpose": "batch"}, default_to_multipart=True)}, "'file'"),
            ({"data": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, "form"),
        ):
            async with http.post("files", **body) as response:
                assert (response.status, words in (await response.json())["error"]["message"]) == (400, True)


@together
async def test_a_large_file_lies_in_the_folder_and_without_one_is_refused_by_name(stand: Stand) -> None:
    large = bytes(BUS_LIMIT + 1)
    with pytest.raises(openai.APIStatusError, match="--files-root") as refused:
        await stand.plain.files.create(file=("large.bin", large), purpose="user_data")
    assert (refused.value.status_code, refused.value.param) == (413, "file")
    made = await stand.rooted.files.create(file=("large.bin", large), purpose="user_data")
    assert [path.name for path in stand.folder.iterdir()] == [made.id]
    digest = hashlib.sha256()
    async with stand.rooted.files.with_streaming_response.content(made.id) as response:
        async for piece in response.iter_bytes():
            digest.update(piece)
    assert digest.digest() == hashlib.sha256(large).digest()
    with pytest.raises(openai.APIStatusError, match="--max-file-mb"):
        await stand.rooted.files.create(file=("larger.bin", bytes((65 << 20) + 1)), purpose="user_data")
    # A gateway that was not told of the folder says so.
    with pytest.raises(openai.InternalServerError, match="--files-root"):
        await stand.plain.files.content(made.id)


@together
async def test_a_bus_without_room_says_so_and_keeps_what_it_has(stand: Stand) -> None:
    kept = await stand.plain.files.create(file=("kept.bin", bytes(1 << 20)), purpose="user_data")
    stream = names.object_stream(names.FILES)
    config = (await stand.bus.js_request(f"STREAM.INFO.{stream}"))["config"]
    await stand.bus.js_request(f"STREAM.UPDATE.{stream}", {**config, "max_bytes": 2 << 20})
    try:
        with pytest.raises(openai.InternalServerError, match="no room .* delete files") as full:
            await stand.plain.files.create(file=("more.bin", bytes(3 << 20)), purpose="user_data")
        assert (full.value.status_code, [file.id async for file in stand.plain.files.list()]) == (507, [kept.id])
        assert await stand.bytes_on_the_bus() < 2 << 20
        assert (await stand.plain.files.content(kept.id)).content == bytes(1 << 20)
    finally:
        await stand.bus.js_request(f"STREAM.UPDATE.{stream}", config)


@together
async def test_an_upload_that_is_cut_off_leaves_nothing(stand: Stand) -> None:
    head = b"--x\r\nContent-Disposition: form-data; name=file; filename=f\r\n\r\n"
    arrived = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield head
        for _ in range(16):
            yield bytes(1 << 20)
        arrived.set()
        await asyncio.sleep(60)

    async with aiohttp.ClientSession(base_url=str(stand.plain.base_url)) as http:
        sending = asyncio.create_task(
            http.post("files", data=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        )
        await arrived.wait()
        while not await stand.bytes_on_the_bus():
            await asyncio.sleep(0.02)
        sending.cancel()
        async with asyncio.timeout(20):
            while await stand.bytes_on_the_bus():
                await asyncio.sleep(0.05)
    # What a killed gateway leaves goes when it is a day old.
    files = FileStore(stand.bus)
    old, young = "file-00000000001abcdefghjkmn", files.upload(None)
    writer = ChunkWriter(stand.bus, names.object_subject(names.FILES, old))
    await writer.write(bytes(1 << 20))
    await writer.end()
    await young.write(bytes(1 << 18))
    await young.write(bytes(1 << 18))
    await files.forget_orphans()
    assert 0 < await stand.bytes_on_the_bus() < 1 << 20
    await young.drop()


@together
async def test_a_file_in_a_folder_is_deleted_by_a_gateway_that_has_the_folder(stand: Stand) -> None:
    rooted, plain = FileStore(stand.bus, root=str(stand.folder)), FileStore(stand.bus)
    taken = rooted.upload(None)
    await taken.write(b"x")
    made = await taken.end("a.bin", "user_data", 0)
    with pytest.raises(openai.InternalServerError, match="--files-root"):
        await stand.plain.files.delete(made.id)
    assert (await stand.rooted.files.content(made.id)).content == b"x", "nothing of it is lost"

    gone = msgspec.structs.replace(made, expires_ms=1)
    await plain.records.put(made.id, encode(gone))
    await plain.forget_orphans()
    assert (stand.folder / made.id).exists()
    await rooted.forget_orphans()
    assert list(stand.folder.iterdir()) == []
    entry = await rooted.records.get(made.id)
    assert entry is not None and entry.deleted


def test_a_folder_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--files-root .*no folder"):
        gateway_settings(["--address", "nats://127.0.0.1:1", "--files-root", str(tmp_path / "none")])
