"""The contract of store engines, seen through the service: each test runs on the embedded engine and on Elasticsearch."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from modelbus_broker.errors import Conflict, InvalidRequest, NotFound
from modelbus_broker.messages.search import (
    Chunk,
    Chunks,
    CreateStore,
    Delete,
    DropStore,
    Filter,
    Found,
    Fusion,
    GetStore,
    ListStores,
    Operation,
    ReadChunks,
    Search,
    Sort,
    StoreRecord,
    Stores,
    StoreStatus,
    UpdateStore,
    Upsert,
    Written,
)
from modelbus_workers.search.checks import MAX_DIMENSIONS
from modelbus_workers.search.service import SearchService

from tests.helpers.search import chunk, ids, vector, where

STORE = "知识 base"

PEOPLE = [
    chunk("a", "Ada wrote the first program", age=36, city="London", living=False),
    chunk("b", "Grace found a moth", age=85, city="New York", living=False),
    chunk("c", "Linus wrote a kernel", age=55, city="Portland", living=True),
    chunk("d", "Someone whose age is a text", age="old", city="london"),
    chunk("e", "Nobody knows anything", file_id="f", ordinal=3),
    chunk("f", "Zero and one", age=1, living=True, rate=0.5),
]


#: A filter, and which of PEOPLE it lets through.
FILTERS = [
    (where("eq", "age", 36), "a"),
    (where("eq", "age", 36.0), "a"),
    (where("eq", "age", "old"), "d"),
    (where("eq", "living", True), "cf"),
    (where("eq", "age", True), ""),  # 1 is no truth value
    (where("eq", "living", 1), ""),
    (where("eq", "city", "London"), "a"),
    (where("ne", "city", "London"), "bcdef"),
    (where("ne", "living", True), "abde"),
    (where("gt", "age", 55), "b"),
    (where("gte", "age", 55), "bc"),
    (where("lt", "age", 36), "f"),
    (where("lte", "age", 36), "af"),
    (where("gt", "city", "New"), "bcd"),  # texts compare by their bytes
    (where("in", "city", ["London", "Portland", "Paris"]), "ac"),
    (where("in", "age", [1, "old", True]), "df"),
    (where("in", "city", []), ""),
    (where("nin", "city", ["London", "Portland"]), "bdef"),
    (where("eq", "rate", 0.5), "f"),
    (where("eq", "nothing has this", "x"), ""),
    (where("and", "", None, where("gte", "age", 36), where("eq", "living", False)), "ab"),
    (where("or", "", None, where("eq", "age", "old"), where("eq", "living", True)), "cdf"),
    (where("not", "", None, where("or", "", None, where("gt", "age", 1), where("eq", "city", "london"))), "ef"),
    (where("and", "", None, where("gte", "age", 36), where("lte", "age", 60)), "ac"),  # a range
    (where("eq", "$id", "b"), "b"),
    (where("in", "$id", ["b", "e", "x"]), "be"),
    (where("eq", "$file_id", "f"), "e"),
    (where("gte", "$ordinal", 1), "e"),
]


async def asked(service: SearchService, operation: Operation) -> Any:
    return await service.answer(operation)


async def filled(service: SearchService, chunks: list[Chunk], **record: Any) -> None:
    await asked(service, CreateStore(record=StoreRecord(name=STORE, **record)))
    await asked(service, Upsert(store=STORE, chunks=chunks))


async def found(service: SearchService, **search: Any) -> Found:
    reply = await asked(service, Search(stores=[STORE], **search))
    assert isinstance(reply, Found)
    return reply


async def test_a_store_is_made_shown_changed_and_dropped(service: SearchService) -> None:
    made = await asked(service, CreateStore(record=StoreRecord(name=STORE, metadata={"owner": "me"})))
    again = await asked(service, CreateStore(record=StoreRecord(name=STORE)))
    with pytest.raises(Conflict):
        await asked(service, CreateStore(record=StoreRecord(name=STORE), must_be_new=True))

    assert isinstance(made, StoreStatus)
    assert (made.record.name, made.record.metadata, made.chunks) == (STORE, {"owner": "me"}, 0)
    assert made.record.id == again.record.id != ""

    await asked(service, Upsert(store=STORE, chunks=[chunk("1", "x", [1, 0], file_id="f"), chunk("2", "y")]))
    changed = await asked(service, UpdateStore(store=STORE, metadata={"a": "b"}, fusion=Fusion(kind="rrf")))
    listed = await asked(service, ListStores())

    assert isinstance(listed, Stores)
    assert [status.record for status in listed.stores] == [changed.record]
    assert (changed.record.metadata, changed.record.fusion.kind, changed.record.dimensions) == ({"a": "b"}, "rrf", 2)
    assert (changed.chunks, changed.vectors, changed.files) == (2, 1, 1)
    assert listed.stores[0].bytes > 0

    assert await asked(service, DropStore(store=STORE)) == Written(chunks=2)
    assert await asked(service, ListStores()) == Stores()
    for operation in (GetStore(store=STORE), DropStore(store=STORE), Upsert(store=STORE, chunks=[chunk("1", "x")])):
        with pytest.raises(NotFound, match=STORE):
            await asked(service, operation)
    with pytest.raises(NotFound, match=STORE):
        await found(service, text="x")


async def test_chunks_come_back_as_they_were_written(service: SearchService) -> None:
    whole = Chunk(
        id="id/1 🚍", text="第一行\nsecond line 🚍", title="Guide > 安装", vector=vector(0.1, -2.5e-3, 3.0), file_id="file-1",
        ordinal=7, start=12, end=30, attributes={"lang": "zh", "year": 2020, "score": 1.5, "public": True},
    )  # fmt: skip
    bare = Chunk(id="bare", text="no more than a text")
    await filled(service, [whole, bare])

    read = await asked(service, ReadChunks(store=STORE, ids=["bare", "missing", whole.id]))
    without = await asked(service, ReadChunks(store=STORE, ids=[whole.id], vectors=False))

    assert read == Chunks(chunks=[bare, whole])
    assert isinstance(read.chunks[1].attributes["year"], int)
    assert without.chunks == [msgspec.structs.replace(whole, vector=b"")]


async def test_writing_an_id_again_replaces_its_chunk(service: SearchService) -> None:
    await filled(service, [chunk("1", "apples", [1, 0]), chunk("2", "pears", [0, 1])])

    written = await asked(
        service, Upsert(store=STORE, chunks=[chunk("1", "lost"), chunk("1", "cherries", [0, 1]), chunk("3", "plums")])
    )

    assert written == Written(chunks=2)
    assert ids(await found(service, text="apples")) == ids(await found(service, text="lost")) == []
    assert ids(await found(service, text="cherries")) == ["1"]
    assert ids(await found(service, vector=vector(0, 1))) == ["1", "2"]
    assert (await asked(service, GetStore(store=STORE))).chunks == 3


async def test_all_chunks_are_read_page_by_page_in_the_order_of_their_ids(service: SearchService) -> None:
    names = ["B", "a", "é", "z", "中", "🚍", "0", "00"]
    await filled(service, [chunk(name, "text") for name in names])

    pages: list[list[str]] = []
    after = ""
    while page := (await asked(service, ReadChunks(store=STORE, after=after, limit=3))).chunks:
        pages.append([item.id for item in page])
        after = page[-1].id

    assert pages == [["0", "00", "B"], ["a", "z", "é"], ["中", "🚍"]]


async def test_filters_let_the_same_chunks_through_everywhere(service: SearchService) -> None:
    await filled(service, PEOPLE)

    listed = [(condition, await found(service, filter=condition, sort=[Sort(key="$id")])) for condition, _ in FILTERS]

    assert [(condition, "".join(ids(hits))) for condition, hits in listed] == FILTERS
    # The same filter on the way to the best by text and by vector, and on what is deleted.
    await filled(
        service,
        [
            msgspec.structs.replace(item, text=f"{item.text} common", vector=vector(1, n))
            for n, item in enumerate(PEOPLE)
        ],
    )
    for condition, expected in FILTERS[:24]:
        hits = await found(service, text="common", vector=vector(1, 0), filter=condition)
        assert sorted(ids(hits)) == sorted(expected), condition
    young = where("lt", "age", 55)
    assert await asked(service, Delete(store=STORE, filter=young)) == Written(chunks=2)
    assert ids(await found(service, sort=[Sort(key="$id")])) == ["b", "c", "d", "e"]


async def test_a_filter_that_was_asked_before_sees_what_was_written_since(service: SearchService) -> None:
    red, asking = where("eq", "colour", "red"), {"text": "one", "vector": vector(1, 0)}
    await filled(service, [chunk("a", "one", [1, 0], colour="red"), chunk("b", "one", [1, 0], colour="blue")])
    assert ids(await found(service, filter=red, **asking)) == ["a"]

    await asked(service, Upsert(store=STORE, chunks=[chunk("b", "one", [1, 0], colour="red")], searchable=True))
    assert sorted(ids(await found(service, filter=red, **asking))) == ["a", "b"]
    await asked(service, Upsert(store=STORE, chunks=[chunk("a", "one", [1, 0], colour="blue")], searchable=True))
    assert ids(await found(service, filter=red, **asking)) == ["b"]
    await asked(service, Delete(store=STORE, ids=["b"]))
    assert ids(await found(service, filter=red, **asking)) == []


async def test_chunks_are_deleted_by_id_by_file_and_all_together(service: SearchService) -> None:
    parts = [chunk(f"{file}{n}", "text", [1, n], file_id=file, ordinal=n) for file in "xyz" for n in range(3)]
    await filled(service, [*parts, chunk("alone", "text")])

    assert await asked(service, Delete(store=STORE, ids=["x0", "x0", "missing"])) == Written(chunks=1)
    assert await asked(service, Delete(store=STORE)) == Written(chunks=0)
    assert await asked(service, Delete(store=STORE, file_ids=["y", ""])) == Written(chunks=3)
    assert sorted(ids(await found(service, text="text"))) == ["alone", "x1", "x2", "z0", "z1", "z2"]
    assert ids(await found(service, vector=vector(1, 2), limit=1)) == ["x2"]
    both = Delete(store=STORE, ids=["x1"], filter=where("gte", "$ordinal", 2))
    assert await asked(service, both) == Written(chunks=3)
    assert await asked(service, Delete(store=STORE, everything=True)) == Written(chunks=3)
    assert ids(await found(service)) == ids(await found(service, text="text", vector=vector(1, 1))) == []
    await asked(service, Upsert(store=STORE, chunks=[chunk("x0", "text", [1, 0])]))
    assert ids(await found(service, text="text", vector=vector(1, 1))) == ["x0"]


async def test_a_listing_is_sorted_cut_and_gone_on_with(service: SearchService) -> None:
    await filled(service, PEOPLE)

    async def listed(**search: Any) -> str:
        return "".join(ids(await found(service, **search)))

    assert await listed(sort=[Sort(key="age")]) == "facbde"  # numbers, then texts, then those without
    assert await listed(sort=[Sort(key="age", descending=True)]) == "bcafde"
    assert await listed(sort=[Sort(key="living"), Sort(key="city", descending=True)]) == "bacfde"
    assert (
        await listed(sort=[Sort(key="$ordinal", descending=True), Sort(key="$id", descending=True)], limit=3) == "efd"
    )
    assert await listed(sort=[Sort(key="age")], limit=2, offset=2) == "cb"
    # The hits of a search come in the same order.
    assert await listed(text="wrote whose knows found", sort=[Sort(key="age")]) == "acbde"


async def test_text_is_found_in_any_language_by_its_words_characters_and_names(service: SearchService) -> None:
    texts = {
        "zh": "使用 byzerllm 部署一个私有大模型，然后启动服务",
        "ja": "モデルを配置する方法",
        "en": "Deploying the models was running smoothly",
        "id": "call setup_default_emb_model on gpt_emb, then MiniLM-L6-v2 and getHTTPResponse",
        "wide": "ＡＢＣ１２３",
    }
    await filled(
        service, [chunk(key, text) for key, text in texts.items()] + [chunk("title", "body", title="标题 Heading")]
    )
    queries = {
        "如何部署大模型": "zh", "配置": "ja", "deployed model runs": "en", "gpt_emb": "id", "emb": "id", "minilm": "id",
        "http response": "id", "abc123": "wide", "byzerllm": "zh", "标题": "title", "HEADINGS": "title", "the": "", "🚍 !": "",
    }  # fmt: skip

    best = {query: "".join(ids(await found(service, text=query))[:1]) for query in queries}

    assert best == queries


async def test_hits_carry_scores_ranks_highlights_and_a_passage(service: SearchService) -> None:
    long = "Nothing to see here. " * 40 + "The emergency brake is red. " + "Nothing to see here. " * 40
    await filled(service, [chunk("long", long, [0, 1]), chunk("short", "紧急制动 brake", [1, 1])])

    hits = (await found(service, text="emergency brakes 制动", vector=vector(0, 1))).hits
    plain = (await found(service, text="brake", highlights=False, vectors=True)).hits

    by_id = {hit.chunk.id: hit for hit in hits}
    marked = [by_id["long"].chunk.text[span.start : span.end] for span in by_id["long"].highlights]
    assert marked == ["emergency", "brake"]
    assert [by_id["short"].chunk.text[span.start : span.end] for span in by_id["short"].highlights] == ["制动", "brake"]
    passage = by_id["long"].passage
    assert passage is not None and 150 <= passage.end - passage.start <= 200
    assert "emergency brake" in by_id["long"].chunk.text[passage.start : passage.end]
    scores = by_id["long"].scores
    assert (scores.vector_rank, scores.text_rank) == (1, 2)
    assert scores.vector == pytest.approx(1.0, abs=1e-4) and scores.text is not None and scores.text > 0
    assert by_id["short"].scores.vector == pytest.approx(0.7071, abs=1e-3)
    assert all(hit.chunk.vector == b"" for hit in hits)
    assert [(hit.highlights, hit.passage, bool(hit.chunk.vector)) for hit in plain] == [([], None, True)] * 2


async def test_several_stores_are_searched_at_once(service: SearchService) -> None:
    for name, texts in (("one", ["red apples", "green pears"]), ("two", ["red cars and apples", "a bus"])):
        await asked(service, CreateStore(record=StoreRecord(name=name)))
        await asked(service, Upsert(store=name, chunks=[chunk(text.split()[-1], text) for text in texts]))

    reply = await asked(service, Search(stores=["one", "two", "one"], text="red apples"))
    few = await asked(service, Search(stores=["one", "two"], text="red bus", limit=1))

    assert {(hit.store, hit.chunk.id) for hit in reply.hits} == {("one", "apples"), ("two", "apples")}
    assert len(few.hits) == 1
    with pytest.raises(NotFound, match="three"):
        await asked(service, Search(stores=["one", "three"], text="red"))
    with pytest.raises(InvalidRequest, match="one store"):
        await asked(service, Search(stores=["one", "two"]))


async def test_the_threshold_window_and_weights_are_the_callers(service: SearchService) -> None:
    chunks = [chunk(str(n), "word " * (10 - n) + "x" * n, [1, n]) for n in range(10)]
    await filled(service, chunks)
    query: dict[str, Any] = {"text": "word", "vector": vector(1, 9)}

    by_text = ids(await found(service, **query, fusion=Fusion(vector_weight=0.0)))
    by_vector = ids(await found(service, **query, fusion=Fusion(text_weight=0.0)))
    narrow = await found(service, **query, limit=1, fusion=Fusion(kind="rrf", window=1))
    good = await found(service, **query, score_threshold=0.6)

    assert by_text == ids(await found(service, text="word"))
    assert by_vector == ids(await found(service, vector=vector(1, 9)))
    assert by_text != by_vector
    assert ids(narrow) in ([by_text[0]], [by_vector[0]])
    assert all(hit.score >= 0.6 for hit in good.hits) and 0 < len(good.hits) < 10


async def test_what_cannot_be_stored_or_asked_is_refused_with_what_to_do(service: SearchService) -> None:
    await filled(service, [chunk("1", "x", [1, 0])], embedding_model="emb", schema={"year": "number"})
    numbers = range(MAX_DIMENSIONS + 1)
    refused: list[tuple[Operation, str]] = [
        (CreateStore(record=StoreRecord(name="a/b")), "no name for a store"),
        (
            CreateStore(record=StoreRecord(name=STORE, embedding_model="other")),
            "'emb', not with 'other'.*build the store anew",
        ),
        (CreateStore(record=StoreRecord(name=STORE, dimensions=3)), "has 3 dimensions, those of store .* have 2"),
        (upsert(chunk("2", "y", [1, 2, 3])), "'2' has 3 dimensions.*model 'emb': use that model"),
        (upsert(chunk("2", "y", [0, 0])), "all zeros"),
        (upsert(chunk("2", "y", [float("nan"), 0])), "not finite"),
        (upsert(Chunk(id="2", vector=b"123")), "no list of 1 to 4096 float32"),
        (upsert(chunk("2", "y", numbers)), "no list of 1 to 4096 float32"),
        (upsert(chunk("2", "")), "'2' is empty"),
        (upsert(chunk("2", "\0")), "'2' is empty"),
        (upsert(chunk("", "y")), "has no id"),
        (upsert(chunk("i" * 501, "y")), "more than 500 bytes"),
        (upsert(chunk("2", "y" * (100 << 20))), "more than 1 MiB: split it"),
        (upsert(chunk("2", "y", year="2020")), "is a string; the schema of store .* says number"),
        (upsert(chunk("2", "y", month=1)), "has only year"),
        (upsert(Chunk(id="2", text="y", attributes={"a.b": 1})), "no name for an attribute"),
        (upsert(chunk("2", "y", year=2**60)), "at most 2\\*\\*53"),
        (Upsert(store=STORE, chunks=[chunk("2", "y", [1, 1])], embedding_model="other"), "'emb', not with 'other'"),
        (search(vector=vector(1, 0, 0)), "the query's vector has 3 dimensions"),
        (search(vector=vector(1, 0), embedding_model="other"), "'emb', not with 'other'"),
        (search(text="x", limit=0), "limit is 1 to 1000"),
        (search(text="x", offset=1), "offset is for listings"),
        (search(text="x" * 100_001), "shorten it"),
        (search(filter=Filter(type="eq", key="year")), "takes one value"),
        (search(filter=Filter(type="in", key="year", value=3)), "takes a list"),
        (search(filter=Filter(type="gt", key="living", value=True)), "have no order"),
        (search(filter=Filter(type="and")), "has no filters"),
        (search(filter=Filter(type="eq", key="$nothing", value=1)), "there is no \\$nothing"),
        (search(text="x", fusion=Fusion(text_weight=-1)), "text_weight is a number from 0"),
        (search(text="x", fusion=Fusion(text_weight=0, vector_weight=0)), "both 0"),
        (Search(stores=[], text="x"), "no store is named"),
        (Delete(store=STORE, filter=Filter(type="not")), "has no filters"),
        (ReadChunks(store=STORE, limit=0), "limit is 1 to 1000"),
    ]

    for operation, words in refused:
        with pytest.raises(InvalidRequest, match=words):
            await asked(service, operation)

    assert (await asked(service, GetStore(store=STORE))).chunks == 1


async def test_nul_bytes_and_huge_words_do_no_harm(service: SearchService) -> None:
    huge = "x" * 70_000
    await filled(service, [chunk("1", f"be\0fore {huge} ending", title="t\0itle"), chunk("2", huge)])

    (stored,) = (await asked(service, ReadChunks(store=STORE, ids=["1"]))).chunks

    assert (stored.text, stored.title) == (f"before {huge} ending", "title")
    assert ids(await found(service, text="ending")) == ["1"]
    assert sorted(ids(await found(service, text=huge))) == ["1", "2"]


def upsert(item: Chunk) -> Upsert:
    return Upsert(store=STORE, chunks=[item])


def search(**fields: Any) -> Search:
    return Search(stores=[STORE], **fields)
