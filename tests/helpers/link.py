"""A wire between one client and the bus that can be cut and mended."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Link:
    """Passes bytes on to a server. Use it with ``async with``."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._port = 0
        self._wires: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaf = False

    @property
    def url(self) -> str:
        """Where the client connects."""
        return f"nats://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def deafen(self) -> None:
        """From now on nothing comes back: the client is heard and hears nothing. Until it is cut."""
        self._deaf = True

    async def cut(self) -> None:
        """Ends all connections and takes no new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for wire in list(self._wires):
            wire.transport.abort()

    async def mend(self) -> None:
        """Takes connections again, at the same place."""
        self._deaf = False
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = int(self._server.sockets[0].getsockname()[1])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            from_bus, to_bus = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        wires = {writer, to_bus}
        self._wires |= wires
        try:
            await asyncio.gather(self._pass_on(reader, to_bus, back=False), self._pass_on(from_bus, writer, back=True))
        finally:
            self._wires -= wires

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if back and self._deaf:
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
