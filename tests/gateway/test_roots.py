"""Where large uploads lie, a folder and a bucket of an S3 service: one contract for both, then gateways that use them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from modelbus_broker.connection import Bus
from modelbus_broker.errors import ConfigurationError, EngineFailed, MissingExtra, NotFound
from modelbus_broker.server import EmbeddedServer
from modelbus_gateway.files import s3, store
from modelbus_gateway.files.roots import Root, open_root
from modelbus_gateway.files.store import FileStore
from modelbus_gateway.settings import GatewaySettings, gateway_settings

from tests.gateway.conftest import StartGateway
from tests.helpers.gateways import Start
from tests.helpers.link import Link
from tests.helpers.s3_server import BUCKET, SECRETS, S3Server, s3_server

PART = 8 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[S3Server]:
    with s3_server() as service:
        yield service


class Place:
    """A root, and what lies there as its owner sees it."""

    def __init__(self, root: str, server: S3Server | None) -> None:
        self.root, self._server = root, server

    def names(self) -> list[str]:
        """Of whole files."""
        return [name for name in self._all() if not name.startswith(".")]

    def begun(self) -> int:
        """Files of which there is a part."""
        if self._server is None:
            return len([name for name in self._all() if name.startswith(".")])
        client = self._server.client()
        try:
            return len(client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))
        finally:
            client.close()

    def _all(self) -> list[str]:
        if self._server is None:
            return [path.name for path in Path(self.root).iterdir()]
        client = self._server.client()
        try:
            found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
            return [str(one["Key"]).removeprefix("of/gateways/") for one in found]
        finally:
            client.close()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "folder":
        (tmp_path / "root").mkdir()
        place = Place(str(tmp_path / "root"), None)
    else:
        service: S3Server = request.getfixturevalue("service")
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        place = Place(f"s3://{BUCKET}/of/gateways/", service)
    yield place
    assert (place.names(), place.begun()) == ([], 0), "a test leaves nothing behind"


async def put(root: Root, name: str, *pieces: bytes) -> None:
    writer = root.writer(name)
    for piece in pieces:
        await writer.write(piece)
    await writer.end()


async def bytes_of(root: Root, name: str) -> bytes:
    return b"".join([piece async for piece in root.read(name)])


async def test_a_root_keeps_whole_files_and_nothing_of_others(place: Place) -> None:
    root = open_root(place.root)
    root.check()
    assert (place.names(), place.begun()) == ([], 0), "looking whether it can be written to leaves nothing"
    large = [bytes([n]) * (5 << 20) for n in range(4)]  # two parts and a half
    await put(root, "large", *large)
    await put(root, "exact", bytes(PART))
    await put(root, "empty", b"")
    assert sorted(place.names()) == ["empty", "exact", "large"]
    assert await bytes_of(root, "large") == b"".join(large)
    assert (await bytes_of(root, "exact"), await bytes_of(root, "empty")) == (bytes(PART), b"")

    begun, dropped = root.writer("begun"), root.writer("dropped")
    await begun.write(bytes(PART + 1))
    await dropped.write(bytes(PART + 1))
    assert place.begun() == 2
    await dropped.drop()
    assert place.begun() == 1
    with pytest.raises(NotFound, match="--files-root"):
        await bytes_of(root, "begun")
    await put(root, "beg", b"another's name begins alike")
    await root.forget("beg")
    assert (place.begun(), sorted(place.names())) == (1, ["empty", "exact", "large"])
    await root.forget("begun")
    assert place.begun() == 0
    with contextlib.suppress(EngineFailed):  # S3 says that there is none
        await begun.drop()
    for name in ("large", "exact", "empty", "empty"):  # one that is not there is no fault
        await root.delete(name)
    root.close()


async def test_gateways_store_large_files_in_a_root_and_take_them_away(
    place: Place, start_gateway: StartGateway, bus: Bus
) -> None:
    async def body(size: int) -> AsyncIterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=purpose\r\n\r\nuser_data\r\n"
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=large.bin\r\n\r\n"
        for n in range(size >> 20):
            yield bytes([n]) * (1 << 20)
        yield b"\r\n--x--\r\n"

    one, two = [await start_gateway(files_root=place.root, max_file_bytes=10 << 20) for _ in range(2)]
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    async with aiohttp.ClientSession() as http, openai.AsyncOpenAI(base_url=f"{two}/v1", api_key="any") as client:
        # A body of unknown length goes there, however small.
        async with http.post(f"{one}/v1/files", data=body(9 << 20), headers=form) as response:
            made = await response.json()
            assert (response.status, made["bytes"]) == (200, 9 << 20)
        assert place.names() == [made["id"]]
        got = await client.files.content(made["id"])  # the other gateway has it too
        wanted = b"".join(bytes([n]) * (1 << 20) for n in range(9))
        assert hashlib.sha256(got.content).digest() == hashlib.sha256(wanted).digest()
        async with http.post(f"{one}/v1/files", data=body(11 << 20), headers=form) as response:
            assert (response.status, "--max-file-mb" in (await response.json())["error"]["message"]) == (413, True)
        assert (place.names(), place.begun()) == ([made["id"]], 0)
        assert [key async for key, _ in FileStore(bus).records.under("upload.*")] == []
        await client.files.delete(made["id"])


async def test_what_a_killed_gateway_leaves_in_a_root_is_taken_away(
    place: Place, bus: Bus, server: EmbeddedServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"--x\r\nContent-Disposition: form-data; name=purpose\r\n\r\nuser_data\r\n"
    file = b"--x\r\nContent-Disposition: form-data; name=file; filename=large.bin\r\n\r\n"
    on = asyncio.Event()

    async def body(to_the_end: bool) -> AsyncIterator[bytes]:
        yield head + file
        for _ in range(9):
            yield bytes(1 << 20)
        await on.wait()
        if to_the_end:
            yield b"\r\n--x--\r\n"
        else:
            await asyncio.sleep(60)

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    async with Link(server.port) as link, aiohttp.ClientSession() as http:
        gateway = start("--address", link.url, "--files-root", place.root, "--log-level", "trace")
        await gateway.ready()
        url = f"{gateway.url}/v1/files"
        sending = [asyncio.create_task(http.post(url, data=body(whole), headers=form)) for whole in (True, False)]
        async with asyncio.timeout(30):
            while await asyncio.to_thread(place.begun) < 2:
                await asyncio.sleep(0.05)
        await link.cut()  # so that the bytes of one are whole and its record cannot be written
        on.set()
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(place.names):
                await asyncio.sleep(0.05)
        gateway.process.kill()
        _, words = await gateway.ended()
        await asyncio.gather(*sending, return_exceptions=True)
    assert ("DEBUG" in words) == place.root.startswith("s3://")
    assert not [secret for secret in SECRETS.values() if secret in words]

    files = FileStore(bus, root=place.root)
    assert (await files.all(), len(place.names()), place.begun()) == ([], 1, 1)
    await files.forget_orphans()
    assert (len(place.names()), place.begun()) == (1, 1), "they are young: their uploads may be going on"
    monkeypatch.setattr(store, "_UPLOAD_S", -1)
    await FileStore(bus).forget_orphans()
    assert (len(place.names()), place.begun()) == (1, 1), "this one has no root"
    kept = files.upload(None)
    await kept.write(b"x")
    record = await kept.end("kept.bin", "user_data", 0)
    await files.records.put(f"upload.{record.id}", b"1")  # as of a gateway that was killed after the record
    theirs = f"file-00000000001{record.id[-12:]}"
    assert files.root is not None
    await put(files.root, theirs, b"of another bus")
    await files.forget_orphans()
    assert (sorted(place.names()), place.begun()) == ([theirs, record.id], 0)
    assert [key async for key, _ in files.records.under("upload.*")] == []
    await files.delete(record)
    await files.root.delete(theirs)
    files.close()


def test_a_root_that_cannot_be_is_refused_at_the_start(
    service: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(root: str, words: str, kind: type[Exception] = ConfigurationError) -> str:
        with pytest.raises(kind, match=words) as error:
            gateway_settings(["--address", "nats://127.0.0.1:1", "--files-root", root])
        return str(error.value)

    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    refused(str(tmp_path / "none"), "--files-root .*no folder")
    refused("s3://", "write a folder, or s3://BUCKET")
    refused("gs://bucket", "write a folder, or s3://BUCKET")
    refused("s3://none-such/x", "--files-root s3://none-such/x .*NoSuchBucket")
    assert "hidden" not in refused("s3://key:hidden@bucket", "AWS_ACCESS_KEY_ID")
    service.ask_for_keys(True)
    try:
        said = refused(f"s3://{BUCKET}", "InvalidAccessKeyId")
        assert not [secret for secret in SECRETS.values() if secret in said]
    finally:
        service.ask_for_keys(False)
    monkeypatch.setattr(s3, "_TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(f"s3://{BUCKET}", "Could not connect to the endpoint URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    refused(f"s3://{BUCKET}", "Invalid endpoint")
    monkeypatch.setitem(sys.modules, "boto3", None)
    refused(f"s3://{BUCKET}", r"pip install 'modelbus\[s3\]'", MissingExtra)
    assert not [secret for secret in SECRETS.values() if secret in repr(GatewaySettings(files_root=f"s3://{BUCKET}"))]


async def test_a_service_that_is_away_is_said_in_the_answer(
    service: S3Server, monkeypatch: pytest.MonkeyPatch, start_gateway: StartGateway
) -> None:
    for name, value in {**service.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "_TRIES", 1)
    url = await start_gateway(files_root=f"s3://{BUCKET}")

    async def body() -> AsyncIterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=purpose\r\n\r\nuser_data\r\n"
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=f\r\n\r\nwords\r\n--x--\r\n"

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/files", data=body(), headers=form) as response:
        assert response.status == EngineFailed.default_status
        assert "--files-root s3://uploads failed: Could not connect" in (await response.json())["error"]["message"]
