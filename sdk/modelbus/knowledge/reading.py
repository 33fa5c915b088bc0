"""Documents are read and cut in a process of their own: ``python -m modelbus.knowledge.reading``.

A long PDF holds Python's lock for seconds, and a damaged one may end its reader; neither may happen to a process through which
answers stream. Frames go both ways over pipes: four bytes of length, then MessagePack.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
from modelbus_broker.errors import EngineFailed, InvalidRequest, MissingExtra, ModelBusError
from modelbus_broker.messages import encode
from modelbus_broker.messages.files import StaticChunking
from modelbus_broker.messages.search import Chunk

from ..token_estimate import estimate_text
from .chunking import ChunkSettings, chunks_of
from .documents import read

#: No file takes longer, or is worth it.
READ_S = 300.0


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    filename: str  #: its suffix says what the file is
    file_id: str
    data: bytes
    chunking: StaticChunking | None = None


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back: chunks, or why there are none."""

    chunks: list[Chunk] = []
    error: str = ""
    missing: bool = False  #: a library, which is not the file's fault


_readings, _cuts = msgspec.msgpack.Decoder(Reading), msgspec.msgpack.Decoder(Cut)


class Reader:
    """The process, started when the first file comes and again when it has ended. One file at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._one = asyncio.Lock()

    async def read(
        self, filename: str, file_id: str, data: bytes, chunking: StaticChunking | None = None
    ) -> list[Chunk]:
        """The chunks of a file's bytes.

        Raises:
            InvalidRequest: it cannot be read; the message says why.
            MissingExtra: a library for its format is not installed.
            EngineFailed: the reader ended, and may do so again.
        """
        asked = encode(Reading(filename=filename, file_id=file_id, data=data, chunking=chunking))
        async with self._one:
            try:
                async with asyncio.timeout(READ_S):
                    cut = await self._exchange(asked)
            except TimeoutError as error:
                await self._end()
                raise InvalidRequest(f"reading it took more than {READ_S:g} s: split it") from error
            except (OSError, asyncio.IncompleteReadError) as error:
                code = await self._end()
                raise EngineFailed(f"the process that read it ended (status {code})") from error
            except BaseException:
                await self._end()  # an answer that nobody waits for would be taken for that of the next file
                raise
        if cut.error:
            raise (MissingExtra if cut.missing else InvalidRequest)(cut.error)
        return cut.chunks

    async def _exchange(self, asked: bytes) -> Cut:
        if self._process is None:
            # It ends when its pipe does, so it does not outlive us.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __spec__.name, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(len(asked).to_bytes(4))
        process.stdin.write(asked)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(4))
        return _cuts.decode(await process.stdout.readexactly(size))

    async def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()

    async def close(self) -> None:
        """Ends the process."""
        await asyncio.shield(self._end())


def settings_of(chunking: StaticChunking | None, text: str) -> ChunkSettings:
    """Lengths in characters of lengths in tokens, by what a token of this text is about long."""
    if chunking is None:
        return ChunkSettings()
    per_token = max(1.0, len(text) / max(1, estimate_text(text)))
    most = max(1, round(chunking.max_tokens * per_token))
    overlap = round(chunking.overlap_tokens * per_token)
    return ChunkSettings(size=max(1, overlap + 1, round(most * 0.6)), most=max(most, overlap + 1), overlap=overlap)


def cut(asked: Reading) -> Cut:
    """Reads and cuts one file. What is wrong with it is in the answer."""
    try:
        document = read(Path(asked.filename), asked.data)
        return Cut(chunks=chunks_of(document, asked.file_id, settings_of(asked.chunking, document.text)))
    except MissingExtra as error:
        return Cut(error=error.message, missing=True)
    except ModelBusError as error:
        return Cut(error=error.message)
    except ImportError as error:
        return Cut(error=f"files need {error.name}: pip install 'modelbus[docs]'", missing=True)
    except Exception as error:  # whatever a library says of a damaged file
        return Cut(error=f"it cannot be read: {type(error).__name__}: {error}")


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the pipe ends."""
    while len(head := asked.read(4)) == 4:
        answer = encode(cut(_readings.decode(asked.read(int.from_bytes(head)))))
        answers.write(len(answer).to_bytes(4))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    # What a library prints does not go among the answers.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, pipe)
