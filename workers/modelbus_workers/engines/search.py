"""The engine ``search``: no model, but the stores of a search service, behind a queue like any model.

``model_path`` is the folder of an embedded service. With ``engine=elasticsearch`` the stores are on a cluster, and any number
of workers serve them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec
from modelbus_broker.errors import ConfigurationError, MissingExtra, UpstreamFailed
from modelbus_broker.messages import Capabilities, Storage, Usage, encode

from .base import Encoded, Engine, EngineConfig, EngineOutput, Finished, Run
from .params import read_params

if TYPE_CHECKING:
    from modelbus_workers.search.base import StoreEngine
    from modelbus_workers.search.service import SearchService


T = TypeVar("T")

log = logging.getLogger(__name__)

#: An operation that has waited for its server so long ends before its time is up, so that its error is the server's.
_LAST_WORDS_S = 1.0


class SearchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a ``search`` deployment; ``docs/search.md`` lists them."""

    engine: Literal["embedded", "elasticsearch"] = "embedded"
    #: full: what is acknowledged survives a power cut; normal: the end of the process, however it comes.
    durability: Literal["full", "normal"] = "full"
    url: str = ""  #: of Elasticsearch, as the rest
    api_key: str = ""
    user: str = ""
    password: str = ""
    ca_certs: str = ""
    prefix: str = "mb"
    replicas: int = 0
    refresh: str = "1s"
    timeout_s: float = 30.0  #: of one HTTP request
    outage_s: float = (
        30.0  #: while Elasticsearch does not answer a start and an operation wait so long before they fail
    )


class SearchEngine(Engine):
    """Answers operations on stores."""

    name = "search"
    needs = ("numpy", "snowballstemmer")
    extra = "search"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = read_params(SearchSettings, config.params, engine=self.name)
        self._service: SearchService | None = None
        self._operations: Counter[str] = Counter()

    async def start(self) -> None:
        from modelbus_workers.search.service import SearchService

        engine = self._store_engine()
        try:
            await self._patiently(engine.start, float("inf"))
        except BaseException:
            await engine.close()
            raise
        self._service = SearchService(engine)

    def _store_engine(self) -> StoreEngine:
        settings = self.settings
        try:
            if settings.engine == "embedded":
                from modelbus_workers.search.embedded.engine import EmbeddedEngine

                if not self.config.model_path:
                    raise ConfigurationError("an embedded search service needs --model_path: the folder of its stores")
                return EmbeddedEngine(Path(self.config.model_path).expanduser(), durability=settings.durability)
            from modelbus_workers.search.elastic.engine import ElasticEngine, ElasticSettings
        except ImportError as error:
            raise MissingExtra(
                f"the {settings.engine} search engine needs {error.name}: "
                f"pip install 'modelbus[{'search' if settings.engine == 'embedded' else 'elasticsearch'}]'"
            ) from error
        if not settings.url:
            raise ConfigurationError("a search service on Elasticsearch needs its address: url=http://HOST:9200")
        return ElasticEngine(
            ElasticSettings(
                url=settings.url, api_key=settings.api_key, user=settings.user, password=settings.password,
                ca_certs=settings.ca_certs, prefix=settings.prefix, replicas=settings.replicas,
                refresh=settings.refresh, timeout_s=settings.timeout_s,
            )
        )  # fmt: skip

    def capabilities(self) -> Capabilities:
        return Capabilities(tasks=["storage"], streaming=False)

    @property
    def slots(self) -> int:
        return self.config.slots or 32

    async def storage(self, task: Storage, run: Run) -> AsyncIterator[EngineOutput]:
        assert self._service is not None
        operation, service = task.operation, self._service
        self._operations[type(operation).__name__] += 1
        reply = await self._patiently(lambda: service.answer(operation), run.deadline)
        self.steps += 1
        yield Encoded(encode(reply))
        yield Finished(usage=Usage())

    async def _patiently(self, work: Callable[[], Awaitable[T]], deadline: float) -> T:
        """Does it again while the server behind the stores does not answer: nothing that is done here does harm twice."""
        now = asyncio.get_running_loop().time
        until, pause_s = min(now() + self.settings.outage_s, deadline - _LAST_WORDS_S), 0.2
        while True:
            try:
                return await work()
            except UpstreamFailed as error:
                if now() + pause_s > until:
                    raise
                log.warning("%s", error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def metrics(self) -> str:
        lines = [
            "# HELP search_operations_total Operations on the stores, by kind.",
            "# TYPE search_operations_total counter",
            *(
                f'search_operations_total{{operation="{kind}"}} {count}'
                for kind, count in sorted(self._operations.items())
            ),
        ]
        return "\n".join(lines) + "\n"

    async def close(self) -> None:
        if self._service is not None:
            await self._service.engine.close()
