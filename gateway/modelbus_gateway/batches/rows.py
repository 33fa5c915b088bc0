"""The lines of a batch's files: requests as they are read, answers and errors as they are written. Pure."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable

import msgspec
from modelbus.answers import AnswerBuilder
from modelbus_broker import names
from modelbus_broker.errors import InvalidRequest, ModelBusError
from modelbus_broker.messages.files import BatchError

from ..edge import error_body
from ..openai_answers import chat_answer, completion_answer, embedding_answer
from ..translate import (
    CHAT_BODY,
    COMPLETION_BODY,
    EMBEDDING_BODY,
    Translation,
    translate_chat,
    translate_completion,
    translate_embedding,
)

#: As many as OpenAI takes.
MOST_ROWS = 50_000
#: What is wrong with a file is told so many times.
MOST_ERRORS = 100


class Line(msgspec.Struct, frozen=True):
    """A request of the input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Asked(msgspec.Struct, frozen=True):
    """A request that can be asked, and how its answer is written."""

    model: str  #: as the client calls it
    translation: Translation
    body: Callable[[AnswerBuilder, str], bytes]  #: of the answer, and the id of its request


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Failure(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Written(msgspec.Struct, frozen=True):
    id: str
    custom_id: str
    response: _Response | None
    error: _Failure | None


_decode_line = msgspec.json.Decoder(Line).decode
_encode = msgspec.json.Encoder().encode


async def lines_of(pieces: AsyncIterable[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, from 1."""
    number = 0
    begun: list[bytes] = []  # a line's pieces: joined once, as a line may be as long as the file
    async for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        for other in others:
            number += 1
            line, begun = b"".join(begun), [other]
            if line.strip():
                yield number, line
    line = b"".join(begun)
    if line.strip():
        yield number + 1, line


class Validation:
    """Looks at each line of an input file before anything is asked."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._custom_ids: set[str] = set()
        self.total = 0
        self.errors: list[BatchError] = []

    def take(self, number: int, text: bytes) -> None:
        self.total += 1
        if self.total == MOST_ROWS + 1:
            self._wrong("too_many_requests", f"a batch has at most {MOST_ROWS:,} requests", number)
        try:
            line = _decode_line(text)
        except msgspec.ValidationError as error:
            self._wrong("invalid_request", f"this line is no request: {error}", number)
            return
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._wrong("invalid_json_line", f"this line is no JSON: {error}", number)
            return
        if line.custom_id in self._custom_ids:
            self._wrong("duplicate_custom_id", f"{line.custom_id!r} stands in an earlier line", number, "custom_id")
        self._custom_ids.add(line.custom_id)
        if line.method.upper() != "POST":
            self._wrong("invalid_method", f"the method is POST, not {line.method!r}", number, "method")
        if line.url != self._endpoint:
            self._wrong("invalid_url", f"the batch is for {self._endpoint}, not for {line.url!r}", number, "url")

    def end(self) -> None:
        if not self.total:
            self._wrong("empty_file", "the input file has no requests", None)

    def _wrong(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(BatchError(code=code, message=message, line=line, param=param))


def read_line(text: bytes) -> Line:
    """A line that was validated."""
    return _decode_line(text)


def _chat(body: bytes, role: str) -> Asked:
    asked = CHAT_BODY.read(body)
    translation = translate_chat(asked)

    def written(answer: AnswerBuilder, id: str) -> bytes:
        return chat_answer(
            answer, id=id, created=_created(id), model=asked.model, role=role, logprobs=translation.logprobs,
            legacy_functions=translation.legacy_functions,
        )  # fmt: skip

    return Asked(asked.model, translation, written)


def _completion(body: bytes, role: str) -> Asked:
    asked = COMPLETION_BODY.read(body)
    translation = translate_completion(asked)

    def written(answer: AnswerBuilder, id: str) -> bytes:
        return completion_answer(answer, id=id, created=_created(id), model=asked.model, logprobs=translation.logprobs)

    return Asked(asked.model, translation, written)


def _embedding(body: bytes, role: str) -> Asked:
    asked = EMBEDDING_BODY.read(body)
    translation = translate_embedding(asked)
    return Asked(
        asked.model, translation,
        lambda answer, id: embedding_answer(answer, model=asked.model, base64=translation.base64),
    )  # fmt: skip


#: What may be asked in batches.
ENDPOINTS: dict[str, Callable[[bytes, str], Asked]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
}


def read_body(endpoint: str, line: Line, role: str) -> Asked:
    """What a line asks.

    Args:
        role: of answers to chats.

    Raises:
        InvalidRequest, UnsupportedField: as the route of the endpoint.
    """
    asked = ENDPOINTS[endpoint](bytes(line.body), role)
    if asked.translation.stream:
        raise InvalidRequest("Invalid 'stream': an answer in a file cannot be streamed.", param="stream")
    return asked


def answer_line(line: Line, job: str, body: bytes) -> bytes:
    """A line of the output file."""
    return _line(line, job, _Response(200, job, msgspec.Raw(body)), None)


def error_line(line: Line, job: str, error: ModelBusError) -> bytes:
    """A line of the error file: what the route would have answered."""
    return _line(line, job, _Response(error.status, job, msgspec.Raw(error_body(error))), None)


def unanswered_line(line: Line, job: str, code: str, message: str) -> bytes:
    """A line of the error file, of a request that was taken back."""
    return _line(line, job, None, _Failure(code, message))


def _line(line: Line, job: str, response: _Response | None, error: _Failure | None) -> bytes:
    return _encode(_Written(f"batch_req_{job}", line.custom_id, response, error)) + b"\n"


def _created(job: str) -> int:
    return names.started_ms_of(job) // 1000
