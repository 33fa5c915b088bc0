"""What only the Elasticsearch engine does, on a real server."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from modelbus_broker.errors import ConfigurationError, EngineFailed, InvalidRequest, UpstreamFailed
from modelbus_broker.messages.search import (
    Chunk,
    CreateStore,
    Found,
    GetStore,
    Search,
    Sort,
    StoreRecord,
    StoreStatus,
    Upsert,
    Written,
)
from modelbus_workers.search.elastic.engine import ElasticEngine, ElasticSettings
from modelbus_workers.search.service import SearchService
from modelbus_workers.search.terms import TOKENIZER_VERSION

from tests.helpers.certificates import make_certificates
from tests.helpers.faulty_elastic import faulty_elastic
from tests.helpers.search import chunk, elastic_engine, elastic_settings, ids, needs_elasticsearch, vector

pytestmark = needs_elasticsearch


async def filled(engine: ElasticEngine, chunks: list[Chunk]) -> SearchService:
    service = SearchService(engine)
    await service.answer(CreateStore(record=StoreRecord(name="s")))
    await service.answer(Upsert(store="s", chunks=chunks))
    return service


async def found(service: SearchService, **fields: Any) -> list[str]:
    reply = await service.answer(Search(stores=["s"], **fields))
    assert isinstance(reply, Found)
    return ids(reply)


def raw(engine: ElasticEngine) -> Any:
    """The client of an engine, to play tricks on the server."""
    return engine._client


async def test_an_index_of_another_tokenizer_is_made_anew_behind_its_alias() -> None:
    async with elastic_engine() as engine:
        await filled(engine, [chunk(str(n), f"word{n} common", [1, n], n=n) for n in range(450)])
        (old,) = await raw(engine).indices.get_alias(name=engine._alias("s"))
        record = msgspec.structs.replace(await engine.record("s"), tokenizer=TOKENIZER_VERSION - 1)
        await engine.update(record)
        engine._cached.clear()

        service = SearchService(engine)
        assert await found(service, text="word7", vector=vector(1, 7), limit=1) == ["7"]

        (new,) = await raw(engine).indices.get_alias(name=engine._alias("s"))
        assert new != old and not await raw(engine).indices.exists(index=old)
        status = await service.answer(GetStore(store="s"))
        assert isinstance(status, StoreStatus)
        assert (status.chunks, status.vectors, status.record.tokenizer) == (450, 450, TOKENIZER_VERSION)
        await service.answer(Upsert(store="s", chunks=[chunk("new", "word7")]))
        assert sorted(await found(service, text="word7")) == ["7", "new"]


async def test_two_workers_share_the_stores() -> None:
    settings = elastic_settings()
    async with elastic_engine(settings) as one, elastic_engine(settings) as other:
        first, second = await filled(one, [chunk("1", "apples")]), SearchService(other)

        assert await found(second, text="apples") == ["1"]
        await second.answer(Upsert(store="s", chunks=[chunk("2", "pears", [1, 0])]))
        assert await found(first, text="pears") == ["2"]
        with pytest.raises(InvalidRequest, match="3 dimensions"):
            await first.answer(Upsert(store="s", chunks=[chunk("3", "plums", [1, 0, 0])]))
        await second.answer(Upsert(store="s", chunks=[chunk("3", "plums", [1, 1])]))
        assert await found(first, vector=vector(1, 1), limit=1) == ["3"]


async def test_a_server_that_takes_no_writes_says_why_and_serves_on() -> None:
    async with elastic_engine() as engine:
        service = await filled(engine, [chunk("1", "apples")])
        index = engine._alias("s")
        await raw(engine).indices.put_settings(index=index, settings={"index.blocks.write": True})

        with pytest.raises(EngineFailed, match="takes no writes.*disk is nearly full"):
            await service.answer(Upsert(store="s", chunks=[chunk("2", "pears")]))
        assert await found(service, text="apples pears") == ["1"]

        await raw(engine).indices.put_settings(index=index, settings={"index.blocks.write": None})
        await service.answer(Upsert(store="s", chunks=[chunk("2", "pears")]))
        assert await found(service, text="pears") == ["2"]


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    settings = ElasticSettings(
        url="http://elastic:secret@127.0.0.1:9", password="secret", api_key="secret", timeout_s=1
    )
    engine = ElasticEngine(settings)
    try:
        with pytest.raises(UpstreamFailed, match="127.0.0.1:9 does not answer") as caught:
            await engine.start()
    finally:
        await engine.close()

    assert caught.value.retryable
    assert "secret" not in f"{caught.value} {caught.value.upstream} {settings!r} {settings}"


async def test_writes_that_are_refused_in_part_or_whose_answers_are_lost_are_sent_again() -> None:
    real = elastic_settings()
    async with (
        faulty_elastic(real.url) as proxy,
        elastic_engine(msgspec.structs.replace(real, url=proxy.url)) as engine,
    ):
        service = await filled(engine, [chunk("first", "apples")])
        many = [chunk(f"{n:03}", f"word{n} common", [1, n]) for n in range(300)]

        # Two bulk requests of the upsert: one is full at first, one stores its half, one loses its answer.
        proxy.busy, proxy.halved, proxy.cut = 2, 1, 1
        assert await service.answer(Upsert(store="s", chunks=many)) == Written(chunks=300)
        assert (proxy.busy, proxy.halved, proxy.cut) == (0, 0, 0)
        assert await found(service, text="common", limit=1000, sort=[Sort(key="$id")]) == [item.id for item in many]

        # What cannot be mended by trying is said; the write may be repeated.
        proxy.halved, proxy.status = 1, 400
        with pytest.raises(EngineFailed, match="rejected execution of a part"):
            await service.answer(Upsert(store="s", chunks=[chunk("pears", "pears"), chunk("plums", "plums")]))
        await service.answer(Upsert(store="s", chunks=[chunk("pears", "pears"), chunk("plums", "plums")]))
        assert await found(service, text="pears plums", sort=[Sort(key="$id")]) == ["pears", "plums"]
        # One that stays full: an error that says so, after which a worker tries again.
        proxy.busy = 1000
        with pytest.raises(UpstreamFailed, match="overloaded or not ready") as full:
            await found(service, text="pears")
        proxy.busy = 0
        assert full.value.retryable and await found(service, text="pears") == ["pears"]
        # Servers of 8.x and 9.x are asked for answers in the form of 8.
        asked = [headers["accept"] for headers in proxy.headers]
        assert all("compatible-with=8" in accept for accept in asked)


async def test_a_certificate_is_checked_and_credentials_are_sent(tmp_path: Path) -> None:
    ca, certificate = make_certificates(tmp_path)
    real = elastic_settings()
    async with faulty_elastic(real.url, certificate) as proxy:
        trusting = msgspec.structs.replace(real, url=proxy.url, ca_certs=str(ca))
        for credentials, sent in (
            ({"api_key": "a2V5"}, "ApiKey a2V5"),
            ({"user": "elastic", "password": "s3cret"}, "Basic ZWxhc3RpYzpzM2NyZXQ="),
            ({}, None),
        ):
            proxy.headers.clear()
            async with elastic_engine(msgspec.structs.replace(trusting, **credentials)) as engine:
                assert await found(await filled(engine, [chunk("1", "apples")]), text="apples") == ["1"]
            assert {headers.get("authorization") for headers in proxy.headers} == {sent}
        for wrong, words in (
            (msgspec.structs.replace(trusting, ca_certs=""), "cannot be checked; ca_certs=FILE names the authority"),
            (msgspec.structs.replace(real, url=real.url.replace("http:", "https:")), "begins with http://"),
        ):
            async with contextlib.AsyncExitStack() as stack:
                with pytest.raises(ConfigurationError, match=words):
                    await stack.enter_async_context(elastic_engine(wrong))
    with pytest.raises(ConfigurationError, match="there is no file '/nowhere.pem' on this host"):
        ElasticEngine(msgspec.structs.replace(trusting, ca_certs="/nowhere.pem"))


async def test_too_many_attributes_are_refused_with_what_to_do() -> None:
    async with elastic_engine() as engine:
        service = await filled(engine, [])
        many = [Chunk(id=str(n), text="x", attributes={f"key{n}-{k}": k for k in range(60)}) for n in range(20)]

        with pytest.raises(InvalidRequest, match="use fewer names"):
            await service.answer(Upsert(store="s", chunks=many))
