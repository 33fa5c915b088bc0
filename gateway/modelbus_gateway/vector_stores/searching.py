"""Searches of vector stores: what is asked becomes searches of the search service, and their hits an answer in OpenAI's shape."""

from __future__ import annotations

import msgspec
from modelbus.gathering import gathered
from modelbus.model_client import ModelClient
from modelbus.search.store import AsyncStore, SearchResult
from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages.search import Fusion, Hit, Span, Value

from ..checks import integer
from .chunks import FILENAME, shown_attributes
from .types import RankingOptions, SearchRequest, TextContent, check_ranking

MAX_RESULTS = 50
_MAX_QUERIES = 16
_QUERIES_AT_ONCE = 4
_REWRITE = (
    "Rewrite what the user says as one short search query: the words that a text with the answer would have. Answer with the "
    "query alone, in the user's language."
)


class ChunkPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a chunk stands in its file; ``start`` and ``end`` count characters."""

    ordinal: int
    start: int
    end: int
    heading: str


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    text: float | None
    vector: float | None
    rerank: float | None


class SearchHit(msgspec.Struct, frozen=True, kw_only=True):
    file_id: str
    filename: str
    score: float
    attributes: dict[str, Value]
    content: list[TextContent]
    chunk_id: str
    chunk: ChunkPlace
    highlights: list[Span]
    scores: Scores


class SearchPage(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "vector_store.search_results.page"
    search_query: list[str]
    data: list[SearchHit]
    has_more: bool = False
    next_page: str | None = None


async def search(client: ModelClient, store: AsyncStore, asked: SearchRequest, rewrite_model: str) -> SearchPage:
    """Answers it.

    Args:
        rewrite_model: the chat model that rewrites queries, if one is to do so.

    Raises:
        InvalidRequest: it cannot be meant as it stands; ``param`` names the field.
        ModelBusError: the search service or a model cannot be asked.
    """
    queries = [asked.query] if isinstance(asked.query, str) else asked.query
    if not 1 <= len(queries) <= _MAX_QUERIES or not all(query.strip() for query in queries):
        raise InvalidRequest(f"Invalid 'query': 1 to {_MAX_QUERIES} texts that are not empty.", param="query")
    limit = 10 if asked.max_num_results is None else asked.max_num_results
    integer("max_num_results", limit, 1, MAX_RESULTS)
    options = asked.ranking_options or RankingOptions()
    check_ranking(options)
    if asked.rewrite_query:
        if not rewrite_model:
            raise InvalidRequest(
                "'rewrite_query' needs a chat model: name it in 'rewrite_model', or start the gateway with --rewrite-model.",
                param="rewrite_query",
            )
        queries = await gathered([_rewritten(client, rewrite_model, query) for query in queries], _QUERIES_AT_ONCE)
    try:
        found = await gathered(
            [
                store.search(
                    query, mode=asked.mode, filter=asked.filters, limit=limit, fusion=_fusion(options),
                    score_threshold=options.score_threshold or None,
                    rerank=asked.rerank if asked.rerank and options.ranker != "none" else "",
                )
                for query in queries
            ],
            _QUERIES_AT_ONCE,
        )  # fmt: skip
    except InvalidRequest as error:
        if error.param == "filter":
            raise InvalidRequest(f"Invalid 'filters': {error.message}", param="filters") from error
        raise
    return SearchPage(search_query=queries, data=[_hit(hit) for hit in _merged(found)[:limit]])


async def _rewritten(client: ModelClient, model: str, query: str) -> str:
    turns = [{"role": "system", "content": _REWRITE}, {"role": "user", "content": query}]
    answer = await client.chat(model, turns, temperature=0, max_tokens=100)
    return answer.text.strip() or query


def _fusion(options: RankingOptions) -> Fusion | None:
    """OpenAI's weights are those of reciprocal ranks; here they are scaled so that the best score is 1."""
    if (hybrid := options.hybrid_search) is None:
        return None
    plain = Fusion(kind="rrf")
    scale = (plain.constant + 1) / (hybrid.text_weight + hybrid.embedding_weight)
    return msgspec.structs.replace(
        plain, text_weight=hybrid.text_weight * scale, vector_weight=hybrid.embedding_weight * scale
    )


def _merged(found: list[SearchResult]) -> list[Hit]:
    """The hits of all queries, each chunk once with its best score."""
    best: dict[str, Hit] = {}
    for result in found:
        for hit in result.hits:
            if hit.chunk.id not in best or hit.score > best[hit.chunk.id].score:
                best[hit.chunk.id] = hit
    return sorted(best.values(), key=lambda hit: -hit.score) if len(found) > 1 else list(best.values())


def _hit(hit: Hit) -> SearchHit:
    chunk = hit.chunk
    return SearchHit(
        file_id=chunk.file_id, filename=str(chunk.attributes.get(FILENAME, "")), score=hit.score,
        attributes=shown_attributes(chunk.attributes), content=[TextContent(text=chunk.text)], chunk_id=chunk.id,
        chunk=ChunkPlace(ordinal=chunk.ordinal, start=chunk.start, end=chunk.end, heading=chunk.title),
        highlights=hit.highlights,
        scores=Scores(text=hit.scores.text, vector=hit.scores.vector, rerank=hit.scores.rerank),
    )  # fmt: skip
