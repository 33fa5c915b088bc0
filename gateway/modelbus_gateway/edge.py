"""The one middleware: the key, CORS, errors in the shape of the OpenAI API, and the count of it all."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from modelbus import tracing
from modelbus.tracing import Trace
from modelbus_broker.errors import AuthenticationFailed, ModelBusError, RequestTooLarge

from .metrics import Metrics
from .settings import GatewaySettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

#: Headers that scripts of other origins may read.
EXPOSED_HEADERS = "x-request-id, retry-after"
_METHODS = "GET, POST, DELETE, HEAD, OPTIONS"


class Traffic:
    """The requests that are being answered now; a gateway that stops waits for them.

    Attributes:
        closing: the gateway stops: connections that are still open get one more answer, and are closed with it.
    """

    def __init__(self) -> None:
        self.running = 0
        self.closing = False
        self._idle = asyncio.Event()

    def begin(self) -> None:
        self.running += 1

    def end(self) -> None:
        self.running -= 1
        if self.closing and not self.running:
            self._idle.set()

    async def ended(self, timeout_s: float) -> bool:
        """Waits until all are answered; False if some are not within the time."""
        self.closing = True
        if not self.running:
            return True
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Exchange:
    """What the middleware and the handler of one request tell each other."""

    __slots__ = ("headers", "model", "started", "status", "trace")

    def __init__(self, headers: dict[str, str]) -> None:
        self.started = time.monotonic()
        self.headers = headers  #: of every response to this request
        self.model = ""  #: once it is known to be deployed
        self.trace: Trace | None = None  #: of the gateway's own span; None: nothing is traced
        self.status = 0  #: counted in place of the response's, which went out before the answer failed


EXCHANGE = web.RequestKey("exchange", Exchange)


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    upstream: str | msgspec.UnsetType = msgspec.UNSET  #: a provider's own words


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def error_body(error: ModelBusError) -> bytes:
    """The JSON of an error, in the shape of the OpenAI API."""
    return _body(error.status, error.message, error.code, error.param, error.upstream)


def edge(settings: GatewaySettings, metrics: Metrics, traffic: Traffic) -> Middleware:
    """Makes the middleware."""
    key = b"Bearer " + settings.api_key.encode() if settings.api_key else b""
    cors = _cors(settings)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        exchange = request[EXCHANGE] = Exchange(cors(origin) if origin is not None else {})
        if traffic.closing:
            exchange.headers["Connection"] = "close"
        traffic.begin()
        span = None if tracing.tracer() is None else _span(request, exchange)
        status = 499  # whatever is not answered: its client has hung up
        try:
            if request.method == "OPTIONS":
                response: web.StreamResponse = _preflight(request, settings)
            else:
                if key and request.path.startswith("/v1/"):
                    _check_key(request, key)
                response = await handler(request)
            status = exchange.status or response.status
        except ModelBusError as error:
            status, response = error.status, _error_response(error)
        except web.HTTPException as error:
            status, response = error.status, _http_error(request, error, settings)
        except ConnectionError:
            raise  # the client is gone: aiohttp closes what is left
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            status, response = 500, web.Response(
                status=500, content_type="application/json",
                body=_body(500, "The gateway failed; its log says why.", "internal_error"),
            )  # fmt: skip
        finally:
            traffic.end()
            if span is not None:
                _end(span, exchange, status)
            metrics.ended(_route(request), exchange.model, status, time.monotonic() - exchange.started)
        if exchange.headers and not response.prepared:
            response.headers.update(exchange.headers)
        return response

    return middleware


def _span(request: web.Request, exchange: Exchange) -> Span | None:
    """Begins the gateway's span of a request, below that of its client."""
    headers, route = request.headers, _route(request)
    trace = Trace(headers.get("traceparent", ""), headers.get("tracestate", ""))
    said = {"http.request.method": request.method, "http.route": route, "url.path": request.path}
    span = tracing.start(f"{request.method} {route}", "server", trace=trace, attributes=said)
    exchange.trace = tracing.trace_of(span)
    return span


def _end(span: Span, exchange: Exchange, status: int) -> None:
    said = {"http.response.status_code": status, tracing.REQUEST_MODEL: exchange.model}
    tracing.end(span, error=str(status) if status >= 500 else None, attributes=said)


def _body(status: int, message: str, code: str, param: str = "", upstream: str = "") -> bytes:
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return msgspec.json.encode(
        ErrorBody(
            ErrorDetail(
                message=message, type=kind, param=param or None, code=code or None, upstream=upstream or msgspec.UNSET
            )
        )
    )


def _error_response(error: ModelBusError) -> web.Response:
    response = web.Response(status=error.status, body=error_body(error), content_type="application/json")
    if error.retry_after_s or error.status == 429:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _http_error(request: web.Request, error: web.HTTPException, settings: GatewaySettings) -> web.Response:
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    match error.status:
        case 404:
            message, code = f"Unknown request URL: {request.method} {request.path}.", "unknown_url"
        case 405:
            allowed = headers.get("Allow", "")
            message, code = (
                f"Method {request.method} is not allowed for {request.path}; allowed: {allowed}.",
                "method_not_allowed",
            )
        case 413:
            return _error_response(body_too_large(settings.max_body_bytes))
        case _:
            message, code = error.reason, "http_error"
    return web.Response(
        status=error.status, body=_body(error.status, message, code), headers=headers, content_type="application/json"
    )


def body_too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body of the request is larger than {limit} bytes, the limit of this gateway.")


def _check_key(request: web.Request, key: bytes) -> None:
    given = request.headers.get("Authorization", "")
    if not given:
        raise AuthenticationFailed(
            "You didn't provide an API key. Send it in the header 'Authorization: Bearer YOUR_KEY'."
        )
    scheme, _, value = given.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(b"Bearer " + value.strip().encode(errors="replace"), key):
        raise AuthenticationFailed("Incorrect API key provided.")


def _cors(settings: GatewaySettings) -> Callable[[str], dict[str, str]]:
    """What an origin is told. With credentials the browser wants the origin by name and not ``*``."""
    everyone = "*" in settings.allowed_origins
    if everyone and not settings.allow_credentials:
        open_headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED_HEADERS}
        return lambda origin: dict(open_headers)
    allowed = frozenset(settings.allowed_origins)

    def headers(origin: str) -> dict[str, str]:
        if not everyone and origin not in allowed:
            return {"Vary": "Origin"}
        named = {
            "Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": EXPOSED_HEADERS
        }  # fmt: skip
        if settings.allow_credentials:
            named["Access-Control-Allow-Credentials"] = "true"
        return named

    return headers


def _preflight(request: web.Request, settings: GatewaySettings) -> web.Response:
    headers = {"Allow": _METHODS}
    if "Access-Control-Request-Method" in request.headers:
        everything = "*" in settings.allowed_headers
        wanted = request.headers.get("Access-Control-Request-Headers", "*")
        headers |= {
            "Access-Control-Allow-Methods": _METHODS if "*" in settings.allowed_methods else ", ".join(settings.allowed_methods),
            # ``*`` does not cover Authorization, so what is asked for is named.
            "Access-Control-Allow-Headers": wanted if everything else ", ".join(settings.allowed_headers),
            "Access-Control-Max-Age": "600",
        }  # fmt: skip
    return web.Response(status=204, headers=headers)


def _route(request: web.Request) -> str:
    """The route's pattern: few values, whatever clients ask for."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "(none)"
