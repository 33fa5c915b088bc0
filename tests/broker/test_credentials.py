from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import nkeys
import pytest
from modelbus_broker.connection import Bus
from modelbus_broker.credentials import (
    ROLES,
    Role,
    credential_options,
    load_credential,
    make_credentials,
    server_users,
)
from modelbus_broker.errors import AuthenticationFailed, ConfigurationError
from modelbus_broker.sealing import make_seal_key
from modelbus_broker.server import EmbeddedServer, ServerSettings
from modelbus_broker.settings import BusSettings
from nats.aio.client import Client


class Party:
    """A raw connection in one role, which says what the server refused."""

    def __init__(self) -> None:
        self.client = Client()
        self.refused: list[str] = []

    async def may_publish(self, subject: str, payload: bytes = b"") -> bool:
        """Publishes without a reply subject; the server's refusal comes before the answer to a later ping."""
        before = len(self.refused)
        await self.client.publish(subject, payload)
        await self._round_trip()
        return len(self.refused) == before

    async def may_subscribe(self, subject: str) -> bool:
        before = len(self.refused)
        subscription = await self.client.subscribe(subject)
        await self._round_trip()
        allowed = len(self.refused) == before
        if allowed:
            await subscription.unsubscribe()
        return allowed

    async def _round_trip(self) -> None:
        # Twice: the ping of nats-py's flush overtakes what is still in its own buffer.
        await self.client.flush()
        await self.client.flush()

    async def _note(self, error: Exception) -> None:
        self.refused.append(str(error))


Join = Callable[[Role], Awaitable[Party]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "credentials"


@pytest.fixture
async def guarded(tmp_path: Path, folder: Path) -> AsyncIterator[EmbeddedServer]:
    """A server that lets in the holders of the credentials in ``folder`` only."""
    async with EmbeddedServer(ServerSettings(store=tmp_path / "store", users=server_users(folder))) as server:
        yield server


@pytest.fixture
async def join(guarded: EmbeddedServer, folder: Path) -> AsyncIterator[Join]:
    parties: list[Party] = []

    async def connect(role: Role) -> Party:
        party = Party()
        await party.client.connect(
            guarded.url, error_cb=party._note, **credential_options(str(make_credentials(folder)[role]))
        )
        parties.append(party)
        return party

    yield connect
    for party in parties:
        await party.client.close()


async def _api(party: Party, api: str, body: object = None) -> dict[str, Any]:
    message = await party.client.request(f"$JS.API.{api}", json.dumps(body or {}).encode(), timeout=5)
    answer: dict[str, Any] = json.loads(message.data)
    assert "error" not in answer, answer
    return answer


async def _declare(admin: Party) -> None:
    await _api(
        admin,
        "STREAM.CREATE.MB_HI",
        {"name": "MB_HI", "subjects": ["mb.req.*.hi.>"], "retention": "workqueue", "storage": "memory"},
    )
    await _api(
        admin,
        "CONSUMER.CREATE.MB_HI.chat_hi_0",
        {
            "stream_name": "MB_HI",
            "config": {"durable_name": "chat_hi_0", "ack_policy": "explicit", "filter_subject": "mb.req.chat.hi.0"},
        },
    )
    await _api(
        admin,
        "STREAM.CREATE.KV_deployments",
        {"name": "KV_deployments", "subjects": ["$KV.deployments.>"], "allow_direct": True, "max_msgs_per_subject": 1},
    )


def test_the_files_are_made_once_and_are_private(folder: Path) -> None:
    first = {role: path.read_text() for role, path in make_credentials(folder).items()}
    assert {role: path.read_text() for role, path in make_credentials(folder).items()} == first
    assert set(first) == set(ROLES)
    for path in make_credentials(folder).values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_those_who_start_workers_get_the_node_key(folder: Path) -> None:
    credentials = {role: load_credential(path) for role, path in make_credentials(folder).items()}
    key = make_seal_key(folder.parent / "node.key")
    assert credentials["worker"].seal_key == credentials["admin"].seal_key == key
    assert credentials["client"].seal_key == ""


def test_a_credential_shows_no_secret(folder: Path) -> None:
    credential = load_credential(make_credentials(folder)["worker"])
    assert credential.seed.startswith("SU")
    for secret in (credential.seed, credential.seal_key):
        assert secret not in repr(credential)
        assert secret not in str(credential)


def test_files_of_other_tools_are_taken(tmp_path: Path) -> None:
    seed = nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER).decode()
    bare = tmp_path / "user.nk"
    bare.write_text(seed + "\n")
    creds = tmp_path / "user.creds"
    creds.write_text("-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n")
    assert credential_options(str(bare)) == {"nkeys_seed_str": seed}
    assert credential_options(str(creds)) == {"user_credentials": str(creds)}
    assert credential_options("") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SUwrong",
        "a line\nanother",
        "-----BEGIN MODELBUS CREDENTIAL-----\nrole: king\n-----END MODELBUS CREDENTIAL-----",
        "-----BEGIN MODELBUS CREDENTIAL-----\nrole: worker\nnkey-seed: hush\n-----END MODELBUS CREDENTIAL-----",
    ],
)
def test_a_file_that_is_no_credential_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.cred"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"some\.cred") as caught:
        load_credential(path)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="No such file"):
        load_credential(tmp_path / "absent.cred")


async def test_missing_and_wrong_credentials_are_refused(guarded: EmbeddedServer, tmp_path: Path) -> None:
    other = make_credentials(tmp_path / "elsewhere" / "credentials")["admin"]
    for creds in ("", str(other)):
        with pytest.raises(AuthenticationFailed, match="--creds"):
            await Bus.connect(BusSettings(url=guarded.url, creds=creds), name="test")


async def test_a_client_publishes_a_request_and_a_worker_pulls_and_acks_it(join: Join) -> None:
    admin, client, worker = await join("admin"), await join("client"), await join("worker")
    await _declare(admin)
    stored = await client.client.request("mb.req.chat.hi.0", b"question", timeout=5)
    assert json.loads(stored.data)["seq"] == 1
    inbox = worker.client.new_inbox()
    pulls = await worker.client.subscribe(inbox)
    ask = json.dumps({"batch": 1, "expires": 5_000_000_000}).encode()
    await worker.client.publish("$JS.API.CONSUMER.MSG.NEXT.MB_HI.chat_hi_0", ask, reply=inbox)
    pulled = await pulls.next_msg(timeout=5)
    assert pulled.data == b"question"
    acked = await worker.client.request(pulled.reply, b"+ACK", timeout=5)
    assert acked.data == b""
    assert (await _api(worker, "STREAM.INFO.MB_HI"))["state"]["messages"] == 0


async def test_frames_reach_the_client_and_answers_reach_the_worker(join: Join) -> None:
    client, worker = await join("client"), await join("worker")
    frames = await client.client.subscribe("mb.rsp.g1.*")
    alive = await client.client.subscribe("mb.gw.g1")
    await client.client.flush()
    await worker.client.publish("mb.rsp.g1.w1", b"frame")
    assert (await frames.next_msg(timeout=5)).data == b"frame"

    async def answer() -> None:
        await (await alive.next_msg(timeout=5)).respond(b"stop")

    answering = asyncio.create_task(answer())
    assert (await worker.client.request("mb.gw.g1", b"alive", timeout=5)).data == b"stop"
    await answering


async def test_a_worker_reads_the_registry_and_writes_its_own_part(join: Join) -> None:
    admin, worker = await join("admin"), await join("worker")
    await _declare(admin)
    await admin.client.request("$KV.deployments.chat", b"wish", timeout=5)
    read = await worker.client.request("$JS.API.DIRECT.GET.KV_deployments.$KV.deployments.chat", b"", timeout=5)
    assert read.data == b"wish"
    for bucket in ("workers", "nodes", "claims", "failures", "runs", "answers"):
        assert await worker.may_publish(f"$KV.{bucket}.x")
    for subject in ("mb.usage", "mb.dead.chat"):
        assert await worker.may_publish(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "mb.req.chat.hi.0",
        "mb.re.chat.any",
        "$KV.deployments.chat",
        "$KV.keys.x",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.UPDATE.MB_HI",
        "$JS.API.STREAM.DELETE.MB_HI",
        "$JS.API.STREAM.PURGE.MB_HI",
        "$JS.API.STREAM.MSG.GET.MB_HI",
        "$JS.API.STREAM.MSG.DELETE.MB_HI",
        "$JS.API.DIRECT.GET.MB_OUT.x",
        "$JS.API.DIRECT.GET.KV_keys",
        "$JS.API.CONSUMER.CREATE.MB_HI.x",
        "$JS.API.CONSUMER.DURABLE.CREATE.MB_HI.x",
        "$JS.API.CONSUMER.DELETE.MB_HI.x",
        "mb.ctl.g1",
        "anything",
    ],
)
async def test_a_worker_may_not_publish(join: Join, subject: str) -> None:
    assert not await (await join("worker")).may_publish(subject)


@pytest.mark.parametrize(
    "subject", [">", "_INBOX.>", "_INBOX_client.>", "_INBOX_admin.>", "mb.>", "mb.req.>", "mb.rsp.>", "$KV.keys.>"]
)
async def test_a_worker_may_not_listen(join: Join, subject: str) -> None:
    assert not await (await join("worker")).may_subscribe(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "$KV.deployments.chat",
        "$KV.claims.x",
        "$KV.workers.x",
        "$KV.nodes.x",
        "$KV.keys.x",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.DELETE.MB_HI",
        "$JS.API.STREAM.MSG.GET.MB_HI",
        "$JS.API.CONSUMER.CREATE.MB_HI.x",
        "$JS.API.CONSUMER.MSG.NEXT.MB_HI.chat_hi_0",
        "mb.rsp.g1.w1",
        "mb.usage",
    ],
)
async def test_a_client_may_not_publish(join: Join, subject: str) -> None:
    assert not await (await join("client")).may_publish(subject)


async def test_a_client_may_make_the_consumer_that_half_an_answer_goes_on_through(join: Join) -> None:
    client = await join("client")
    assert await client.may_publish("$JS.API.CONSUMER.CREATE.MB_RE.chat_re_c.mb.re.chat.c")
    assert not await client.may_publish("$JS.API.CONSUMER.CREATE.MB_RE.all.mb.re.>")


@pytest.mark.parametrize("subject", [">", "_INBOX.>", "_INBOX_worker.>", "_INBOX_admin.>", "mb.req.>", "mb.find"])
async def test_a_client_may_not_listen(join: Join, subject: str) -> None:
    assert not await (await join("client")).may_subscribe(subject)


async def test_jobs_need_nothing_that_clients_and_workers_may_not_do(join: Join) -> None:
    client, worker = await join("client"), await join("worker")
    for subject in (
        "$KV.jobs.j1",
        "$KV.answers.j1",
        "$JS.API.DIRECT.GET.KV_jobs",
        "$JS.API.DIRECT.GET.MB_LO",
        "mb.ctl.workers",
    ):
        assert await client.may_publish(subject), subject
    assert await client.may_subscribe("$KV.answers.j1")
    # Whether another worker has a job that was delivered twice: the question, and its answer.
    assert await worker.may_publish("mb.find") and await worker.may_publish("_INBOX_worker.x")
    for subject in ("$KV.jobs.j1", "$JS.API.DIRECT.GET.KV_jobs"):
        assert not await worker.may_publish(subject), subject


async def test_an_admin_may_do_everything(join: Join) -> None:
    admin = await join("admin")
    assert await admin.may_subscribe(">")
    assert await admin.may_publish("anything")
    await _declare(admin)
