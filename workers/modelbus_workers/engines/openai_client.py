"""The HTTP side of the engine ``openai``: one session to one provider, silence limits, retries, no leaked secret."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
from modelbus_broker.errors import ConfigurationError, ModelBusError, StreamCut, UpstreamFailed

from .openai_errors import Secrets, TryAgain, failure, failure_in_stream
from .openai_lists import decode_models
from .sse import EventParser

log = logging.getLogger(__name__)
T = TypeVar("T")

_CONNECT_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
#: A provider that asks for more patience than this is not waited for: another worker may have it sooner.
_PATIENCE_S = 60.0
#: How often it is looked whether a silent connection is still there.
_LOOK_S = 0.5
_MAX_BODY_BYTES = 64 << 20
_EVENT_STREAM = re.compile(rb"(data|event|id|retry)?:")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a provider is and how it wants to be talked to."""

    base_url: str
    headers: Mapping[str, str] = {}
    query: Mapping[str, str] = {}
    proxy: str = ""
    local_address: str = ""
    tls_ca: str = ""
    connections: int = 64
    timeout_s: float = 0.0  #: for a whole call; 0: only the silence limits count
    first_byte_timeout_s: float = 120.0
    stall_timeout_s: float = 60.0
    max_retries: int = 3

    def __repr__(self) -> str:
        return f"Endpoint(base_url={shown_url(self.base_url)!r})"


class Upstream:
    """One provider. ``open`` it before use and ``close`` it after."""

    def __init__(self, endpoint: Endpoint, secrets: Secrets) -> None:
        self.endpoint = endpoint
        self.secrets = secrets
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Raises ConfigurationError when the TLS or address settings cannot be used."""
        end = self.endpoint
        try:
            context = ssl.create_default_context(cafile=end.tls_ca) if end.tls_ca else True
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"parameter tls_ca: {end.tls_ca} cannot be read: {error}") from None
        connector = aiohttp.TCPConnector(
            limit=end.connections,
            keepalive_timeout=60,
            ssl=context,
            local_addr=(end.local_address, 0) if end.local_address else None,
        )
        host = urlsplit(end.base_url).hostname or ""
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=dict(end.headers),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            # The proxies of the environment are not meant for a server on this host.
            trust_env=not end.proxy and host not in ("localhost", "127.0.0.1", "::1"),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self, *, required: bool) -> dict[str, int]:
        """Context lengths (0: not told) by model name.

        Args:
            required: the provider is known to have this list. Otherwise a server without one, or whose list fails,
                gives an empty one; only a refused key or a server that is not there is an error.

        Raises:
            UpstreamFailed: the provider cannot be reached, or refuses, in its own words.
        """
        if required:
            return decode_models(await self.retried(lambda _: self._whole("GET", "/models", None)))
        response = self._response("GET", "/models", None)
        try:
            async with response as reader:
                return decode_models(await reader.rest(b""))
        except TryAgain as again:
            if not response.status:
                raise again.error from None
        except ModelBusError:
            if response.status in (0, 401, 402, 403):
                raise
        return {}

    async def description(self) -> bytes:
        """The OpenAPI document of a server that has one, above its ``/v1``; one try.

        Raises:
            TryAgain, ModelBusError: there is none.
        """
        assert self._session is not None, "the upstream is not open"
        root = msgspec.structs.replace(self.endpoint, base_url=self.endpoint.base_url.removesuffix("/v1"))
        async with _Response(self._session, root, self.secrets, "GET", "/openapi.json", None) as reader:
            return await reader.rest(b"")

    async def post(self, path: str, body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None) -> bytes:
        """One try: the whole answer to a body; see ``retried``. Raises TryAgain, ModelBusError."""
        return await self._whole("POST", path, body, headers)

    async def retried(
        self, attempt: Callable[[int], Awaitable[T]], deadline: float = float("inf"), *, fail_fast: bool = False
    ) -> T:
        """Tries until it works, or ``wait`` says that it is enough. The attempt hears how many tries were before it."""
        tries = 0
        while True:
            try:
                return await attempt(tries)
            except TryAgain as again:
                tries += 1
                await self.wait(again, tries, deadline, fail_fast=fail_fast)

    async def wait(self, again: TryAgain, tries: int, deadline: float, *, fail_fast: bool = False) -> None:
        """Waits before the next try, or raises the error when there is to be none.

        Args:
            deadline: event-loop time after which no further try is made.
            fail_fast: another worker may do better; only a connection that had grown stale is replaced.
        """
        error = again.error
        if fail_fast:
            if again.stale and tries == 1:
                return
            raise error
        backoff = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.75, 1.25)
        delay = max(backoff, error.retry_after_s)
        late = asyncio.get_running_loop().time() + delay >= deadline
        if tries > self.endpoint.max_retries or delay > _PATIENCE_S or late:
            raise error
        log.warning("try %d failed, the next one in %.1f s: %s", tries, delay, error)
        await asyncio.sleep(delay)

    async def documents(
        self, path: str, body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """One try: the JSON documents of a streamed answer, or the one of an answer that is not streamed.

        Closing the iterator closes the connection at once.

        Raises:
            TryAgain: the connection failed or the provider said that it is its own fault.
            ModelBusError: a further try makes no sense.
        """
        async with self._response("POST", path, body, headers) as reader:
            head = b""
            while len(head) < 64 and b"\n" not in head and (data := await reader.read()):
                head = (head + data).removeprefix(b"\xef\xbb\xbf").lstrip()
            if head.startswith((b"{", b"[")):
                yield await reader.rest(head)
                return
            if not head:
                raise TryAgain(StreamCut("the provider answered 200 with nothing in it"))
            if not _EVENT_STREAM.match(head):
                raise self._garbage(head)
            async with aclosing(self._events(reader, head)) as events:
                async for document in events:
                    yield document

    async def _events(self, reader: _Reader, head: bytes) -> AsyncGenerator[bytes, None]:
        parser = EventParser()
        data, size = head, 0
        while data:
            size += len(data)
            if size > _MAX_BODY_BYTES:
                raise _too_much()
            for name, document in parser.feed(data):
                if document.strip() == b"[DONE]":
                    reader.ended = True
                    return
                if name == "error":
                    raise failure_in_stream(document, self.secrets)
                yield document
                reader.spoke = True
            data = await reader.read()
        reader.ended = True
        for _, document in parser.end():
            if document.strip() != b"[DONE]":
                if not _is_json(document):
                    raise TryAgain(StreamCut("the provider's answer ended in the middle of an event"))
                yield document

    async def _whole(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        async with self._response(method, path, body, headers) as reader:
            document = await reader.rest(b"")
        if not document.lstrip().startswith((b"{", b"[")):
            raise self._garbage(document)
        return document

    def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> _Response:
        assert self._session is not None, "the upstream is not open"
        return _Response(self._session, self.endpoint, self.secrets, method, path, body, headers)

    def _garbage(self, data: bytes) -> UpstreamFailed:
        shown = self.secrets.hide(data[:300].decode("utf-8", "replace")).strip()
        return UpstreamFailed(
            f"{shown_url(self.endpoint.base_url)} answered with something that is no completion; "
            f"is the URL right? It begins with: {shown[:200]}",
            upstream=shown,
        )


class _Response:
    """An answer whose status was good, as an async context; left before its end, the connection is closed."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        secrets: Secrets,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._session, self._endpoint, self._secrets = session, endpoint, secrets
        self._method, self._path, self._body = method, path, body
        self._headers = dict(headers or {}) if body is None else {"Content-Type": "application/json", **(headers or {})}
        self._response: aiohttp.ClientResponse | None = None
        self._reader: _Reader | None = None

    @property
    def status(self) -> int:
        """The HTTP status; 0: there was no answer."""
        return 0 if self._response is None else self._response.status

    async def __aenter__(self) -> _Reader:
        end = self._endpoint
        now = asyncio.get_running_loop().time()
        limit = now + end.timeout_s if end.timeout_s else float("inf")
        silence = min(now + end.first_byte_timeout_s, limit)
        try:
            async with asyncio.timeout_at(silence):
                self._response = response = await self._session.request(
                    self._method,
                    end.base_url + self._path,
                    params=dict(end.query) or None,
                    data=None if self._body is None else msgspec.json.encode(self._body),
                    headers=self._headers,
                    proxy=end.proxy or None,
                    allow_redirects=False,  # a key goes where the deployment says, nowhere else
                )
        except TimeoutError:
            raise _silent(silence - now) from None
        except (aiohttp.ClientError, OSError) as error:
            text = self._secrets.hide(str(error)) or type(error).__name__
            words = f"the provider at {shown_url(end.base_url)} cannot be reached: {text}"
            stale = not isinstance(error, aiohttp.ClientConnectorError)
            raise TryAgain(UpstreamFailed(words), stale=stale) from None
        self._reader = reader = _Reader(response, end, limit, self._secrets)
        if 200 <= response.status < 300:
            return reader
        try:
            body = await reader.rest(b"")
        except TryAgain:
            body = b""  # the status says enough
        finally:
            response.close()
        if 300 <= response.status < 400:
            target = self._secrets.hide(response.headers.get("Location", ""))
            body = f"redirects to {target}; set that address as base_url".encode()
        raise failure(response.status, body, response.headers, self._secrets)

    async def __aexit__(self, *_: object) -> None:
        assert self._response is not None and self._reader is not None
        if self._reader.ended:
            await self._reader.drain()
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class _Reader:
    """Reads a body and notices silence, cuts and what is too large."""

    def __init__(self, response: aiohttp.ClientResponse, endpoint: Endpoint, limit: float, secrets: Secrets) -> None:
        self._response, self._endpoint, self._limit, self._secrets = response, endpoint, limit, secrets
        #: The first token has come: from now on the shorter silence limit counts.
        self.spoke = False
        #: The answer is whole; what still comes does not matter.
        self.ended = False

    async def read(self) -> bytes:
        """The bytes that are there; b"" at the end."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        silence = self._endpoint.stall_timeout_s if self.spoke else self._endpoint.first_byte_timeout_s
        until = min(began + silence, self._limit)
        while True:
            try:
                async with asyncio.timeout_at(min(until, loop.time() + _LOOK_S)):
                    return await self._response.content.readany()
            except TimeoutError:
                if loop.time() >= until:
                    raise _silent(until - began) from None
                # aiohttp closes a connection on which something else than HTTP has come, and tells nobody.
                if self._is_closed():
                    raise _cut("what came is no HTTP") from None
            except (aiohttp.ClientError, OSError) as error:
                raise _cut(self._secrets.hide(str(error)) or type(error).__name__) from None

    def _is_closed(self) -> bool:
        connection = self._response.connection
        return connection is None or connection.transport is None or connection.transport.is_closing()

    async def rest(self, head: bytes) -> bytes:
        parts, size = [head], len(head)
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > _MAX_BODY_BYTES:
                raise _too_much()
        return b"".join(parts)

    async def drain(self) -> None:
        """Reads the few bytes after the end, so that the connection can be used again."""
        try:
            async with asyncio.timeout(0.1):
                while not self._response.content.at_eof():
                    await self._response.content.readany()
        except (TimeoutError, aiohttp.ClientError, OSError):
            return


def _is_json(document: bytes) -> bool:
    try:
        msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _cut(why: str) -> TryAgain:
    return TryAgain(StreamCut(f"the connection to the provider was cut: {why}"))


def _too_much() -> UpstreamFailed:
    return UpstreamFailed(f"the provider sent more than {_MAX_BODY_BYTES >> 20} MiB for one answer")


def _silent(seconds: float) -> UpstreamFailed:
    return UpstreamFailed(f"the provider sent nothing for {seconds:.0f} s", status=504)


def checked_url(text: str, what: str) -> str:
    """The URL without the path of a single call at its end.

    Raises:
        ConfigurationError: it is no http(s) URL.
    """
    url = text.strip().strip("\"'").rstrip("/")
    for path in ("/chat/completions", "/completions", "/embeddings", "/models"):
        url = url.removesuffix(path)
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(f"parameter {what} is no http:// or https:// URL")
    return url.rstrip("/")


def shown_url(url: str) -> str:
    """The URL without user, password and query, which may be secrets."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path)}"
