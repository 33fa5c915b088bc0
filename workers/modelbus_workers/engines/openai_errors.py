"""One table from what providers answer to our errors, with the provider's own words kept and our secrets not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import msgspec
from modelbus_broker.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelBusError,
    RequestTooLarge,
    UpstreamFailed,
)

#: Providers' codes for "this account is used up": waiting does not help.
_USED_UP = frozenset(
    {"insufficient_quota", "insufficient_balance", "exceeded_current_quota_error", "billing_hard_limit_reached"}
)
_CONTEXT = ("context_length_exceeded", "maximum context length", "context window", "max_model_len")
_MAX_WORDS = 2000


class TryAgain(Exception):
    """A signal, not a failure: this try ended with ``error``, another one may not.

    Attributes:
        stale: the connection was closed when it was used; a new one may be all that is needed.
    """

    def __init__(self, error: ModelBusError, *, stale: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.stale = stale


class Secrets:
    """Hides secret values in texts: providers like to repeat the key that they refuse."""

    def __init__(self, values: Iterable[str]) -> None:
        # Shorter ones would hide common words and are no secrets. Longest first: one may contain another.
        kept = {form for value in values if len(value) >= 4 for form in (value, quote(value, safe=""))}
        self._values = sorted(kept, key=len, reverse=True)

    def hide(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "***")
        return text

    def __repr__(self) -> str:
        return f"Secrets({len(self._values)})"


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider said about an error."""

    text: str
    code: str = ""
    param: str = ""
    status: int = 0  #: an HTTP status inside the body


def words_of(body: bytes, secrets: Secrets) -> Words:
    """The provider's words in an error body of any of the usual shapes."""
    raw = body.decode("utf-8", "replace").strip()
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Words(text=secrets.hide(raw)[:_MAX_WORDS])
    if isinstance(found, list) and found:
        found = found[0]
    outer = found if isinstance(found, dict) else {}
    error: Any = outer.get("error") or outer.get("base_resp") or outer.get("errors") or outer
    inner: dict[str, Any] = error if isinstance(error, dict) else {}
    text: Any = error if isinstance(error, str) else None
    for name in ("message", "msg", "status_msg", "error_msg", "detail", "error_description"):
        text = text or inner.get(name) or outer.get(name)
    if not isinstance(text, str):
        text = msgspec.json.encode(text).decode() if text else raw
    code = inner.get("code") or inner.get("type") or outer.get("code") or outer.get("error_code") or ""
    param = inner.get("param")
    status = code if isinstance(code, int) and 400 <= code < 600 else 0
    return Words(
        text=secrets.hide(text)[:_MAX_WORDS],
        code=secrets.hide(str(code)),
        param=param if isinstance(param, str) else "",
        status=status,
    )


def failure(status: int, body: bytes, headers: Mapping[str, str], secrets: Secrets) -> ModelBusError | TryAgain:
    """The error that an answer with this status stands for; wrapped in ``TryAgain`` when that is worth a try.

    | status | becomes |
    |---|---|
    | 400, 422 and other 4xx | InvalidRequest, with the provider's ``param``; ContextLengthExceeded; 413 RequestTooLarge |
    | 401, 402, 403, 404 | UpstreamFailed 502: the deployment's key, account, URL or model is wrong, not the client's |
    | 408, 409, 425 | UpstreamFailed 502, tried again |
    | 429 | UpstreamFailed 429 with ``retry_after_s``, tried again unless the account is used up |
    | 5xx | UpstreamFailed 502, tried again |
    """
    words = words_of(body, secrets)
    text = f"the provider answered {status}: {words.text}" if words.text else f"the provider answered {status}"
    wait_s = retry_after_s(headers)
    final = headers.get("x-should-retry") == "false"
    if status == 429:
        error = UpstreamFailed(text, status=429, retry_after_s=wait_s, upstream=words.text)
        return error if final or words.code in _USED_UP else TryAgain(error)
    if status >= 500 or status in (408, 409, 425):
        error = UpstreamFailed(text, retry_after_s=wait_s, upstream=words.text)
        return error if final or status == 501 else TryAgain(error)
    if status in (401, 402, 403, 404) or status < 400:
        return UpstreamFailed(text, upstream=words.text)
    if status == 413:
        return RequestTooLarge(text, upstream=words.text)
    lowered = f"{words.code} {words.text}".lower()
    kind = ContextLengthExceeded if any(sign in lowered for sign in _CONTEXT) else InvalidRequest
    return kind(text, param=words.param, upstream=words.text)


def failure_in_stream(document: bytes, secrets: Secrets) -> ModelBusError | TryAgain:
    """The error of an event, or of a body with status 200, that is no completion."""
    words = words_of(document, secrets)
    if words.status:
        return failure(words.status, document, {}, secrets)
    error = UpstreamFailed(f"the provider reported an error: {words.text}", upstream=words.text)
    return error if words.code in _USED_UP else TryAgain(error)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds to wait according to ``Retry-After`` or ``retry-after-ms``; 0 if they say nothing."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("Retry-After", "")
        if not value:
            return 0.0
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
