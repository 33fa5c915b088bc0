"""What Elasticsearch and its client say becomes an error of ours that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_transport import TlsError
from elasticsearch import ApiError, AuthenticationException, AuthorizationException, TransportError
from modelbus_broker.errors import ConfigurationError, EngineFailed, InvalidRequest, ModelBusError, UpstreamFailed

_PASSWORD = re.compile(r"(//)[^/@\s]+@")


@contextmanager
def translated(server: str) -> Iterator[None]:
    """Raises ours for what the client raises inside."""
    try:
        yield
    except (ApiError, TransportError) as error:
        raise failure(error, server) from error


def failure(error: ApiError | TransportError, server: str) -> ModelBusError:
    """
    Args:
        server: its address without a password.
    """
    if isinstance(error, TlsError) and (what_to_do := _tls(str(error))):
        return ConfigurationError(f"no TLS connection to Elasticsearch at {server}: {what_to_do} ({error})")
    if isinstance(error, TransportError):
        return UpstreamFailed(
            f"Elasticsearch at {server} does not answer ({type(error).__name__}): nothing was acknowledged; "
            "the request may be sent again",
            upstream=without_password(str(error)),
        )
    words = without_password(reason(error))
    if isinstance(error, AuthenticationException | AuthorizationException) and "cluster_block" not in words:
        return ConfigurationError(f"Elasticsearch at {server} refuses the credentials: {words}")
    return failed(words, error.meta.status, server)


def failed(words: str, status: int, server: str) -> ModelBusError:
    """What a refused request, or a refused document of a bulk request, means."""
    if "cluster_block_exception" in words or "read-only" in words:
        return EngineFailed(
            f"Elasticsearch at {server} takes no writes ({words}): its disk is nearly full, or the index was made "
            "read-only. Free some space there; what was not acknowledged is not lost if it is sent again"
        )
    if "Limit of total fields" in words:
        return InvalidRequest(
            f"the store has too many different attributes for Elasticsearch ({words}): use fewer names",
            param="attributes",
        )
    if status in (429, 502, 503, 504):
        return UpstreamFailed(f"Elasticsearch at {server} is overloaded or not ready: {words}", upstream=words)
    return EngineFailed(f"Elasticsearch at {server} answered {status}: {words}")


def reason(error: ApiError) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict) and isinstance(details := body.get("error"), dict):
        causes = details.get("root_cause") or [details]
        kind, text = details.get("type", ""), causes[0].get("reason") or details.get("reason", "")
        return f"{kind}: {text}"
    return str(error)


def _tls(words: str) -> str:
    """What to do; "" where trying again may help."""
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return "its certificate cannot be checked; ca_certs=FILE names the authority that signed it"
    if "WRONG_VERSION_NUMBER" in words or "RECORD_LAYER_FAILURE" in words:
        return "it speaks plain HTTP there; the address begins with http://"
    return ""


def is_missing_handler(error: ApiError) -> bool:
    """The server has no such API: one of its modules is not installed."""
    return error.meta.status in (400, 405) and "no handler found" in str(error.body)


def without_password(text: str) -> str:
    return _PASSWORD.sub(r"\1", text)
