"""Files in a bucket of Amazon S3 or of another service that speaks its protocol (MinIO, Ceph, R2): ``--files-root s3://BUCKET/PREFIX``.

Who may go in and where the service is are said as everywhere with AWS: environment variables, ``~/.aws``, roles.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from modelbus_broker.errors import ConfigurationError, EngineFailed, MissingExtra, NotFound

T = TypeVar("T")

log = logging.getLogger(__name__)

_PLACE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([^?#]*))?")
_PIECE = 1 << 20
#: S3 takes 5 MiB to 5 GiB a part and 10,000 parts: the parts grow, so that a file may have 430 GiB.
_PART, _PARTS_OF_A_SIZE = 8 << 20, 1000
#: Calls at once. They wait in threads of their own, so that a service that hangs holds up nothing else.
_THREADS = 8
_CONNECT_S, _READ_S, _TRIES = 5, 30, 3


class S3Writer:
    """One file on its way into the bucket, a part at a time in memory. It is there when :meth:`end` has returned."""

    def __init__(self, bucket: S3Bucket, name: str) -> None:
        self._bucket = bucket
        self._key = bucket.key(name)
        self._rest = bytearray()  #: less than a part
        self._upload = ""
        self._parts: list[dict[str, object]] = []
        self._calling: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Raises EngineFailed: the service does not take it."""
        self._rest += data
        size = _PART * (1 + len(self._parts) // _PARTS_OF_A_SIZE)
        while len(self._rest) >= size:
            part = bytes(memoryview(self._rest)[:size])
            del self._rest[:size]
            await self._do(self._send(part))

    async def end(self) -> None:
        """The file is stored. Raises as :meth:`write`."""
        await self._do(self._finish())

    async def drop(self) -> None:
        """Leaves nothing behind. Raises as :meth:`write`."""
        if self._calling is not None:
            await asyncio.wait({self._calling})
        if self._upload:
            await self._bucket.call("abort_multipart_upload", Key=self._key, UploadId=self._upload)

    async def _do(self, calls: Coroutine[Any, Any, None]) -> None:
        """A thread goes on when nobody waits for it any more: what it does is to be known when it is taken back."""
        self._calling = asyncio.create_task(calls, name="s3-upload")
        await asyncio.shield(self._calling)

    async def _send(self, part: bytes) -> None:
        if not self._upload:
            self._upload = (await self._bucket.call("create_multipart_upload", Key=self._key))["UploadId"]
        number = len(self._parts) + 1
        stored = await self._bucket.call(
            "upload_part", Key=self._key, UploadId=self._upload, PartNumber=number, Body=part
        )
        self._parts.append({"PartNumber": number, "ETag": stored["ETag"]})

    async def _finish(self) -> None:
        if not self._upload:
            await self._bucket.call("put_object", Key=self._key, Body=bytes(self._rest))
            return
        if self._rest:
            await self._send(bytes(self._rest))
        await self._bucket.call(
            "complete_multipart_upload", Key=self._key, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
        )


class S3Bucket:
    """A prefix in a bucket.

    Args:
        place: ``s3://BUCKET`` or ``s3://BUCKET/PREFIX``.

    Raises:
        ConfigurationError: it is none of the two.
    """

    def __init__(self, place: str) -> None:
        if "@" in place:  # not said again: there may be a key in it
            raise ConfigurationError("--files-root: a key has no place in s3://BUCKET/PREFIX; set AWS_ACCESS_KEY_ID")
        if (parts := _PLACE.fullmatch(place)) is None:
            raise ConfigurationError(f"--files-root {place}: write a folder, or s3://BUCKET or s3://BUCKET/PREFIX")
        self._place = place
        self._bucket = parts[1]
        prefix = (parts[2] or "").strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        self._connecting = threading.Lock()
        self._connected: Any = None

    def key(self, name: str) -> str:
        """Of a file in the bucket."""
        return f"{self._prefix}{name}"

    def check(self) -> None:
        """Begins an upload and takes it back: that asks for the rights that uploads need, and stores nothing.

        Raises:
            ConfigurationError: the service cannot be reached, or does not let us; the message says why.
            MissingExtra: its client is not installed.
        """
        key = self.key(".modelbus-check")
        try:
            client = self._client()
            begun = client.create_multipart_upload(Bucket=self._bucket, Key=key)
            client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=begun["UploadId"])
        except MissingExtra:
            raise
        except Exception as error:  # botocore has no one class: ValueError says that the endpoint is no URL
            raise ConfigurationError(f"--files-root {self._place} cannot be written to: {error}") from error

    def writer(self, name: str) -> S3Writer:
        return S3Writer(self, name)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The file, piece by piece.

        Raises:
            NotFound: it is not there.
            EngineFailed: it cannot be read.
        """
        body = (await self.call("get_object", Key=self.key(name)))["Body"]
        try:
            while data := await self._run(functools.partial(body.read, _PIECE)):
                yield data
        finally:
            body.close()

    async def delete(self, name: str) -> None:
        """One that is not there is no fault. Raises EngineFailed: it cannot be deleted."""
        await self.call("delete_object", Key=self.key(name))

    async def forget(self, name: str) -> None:
        """Deletes the file, and the parts of an upload of it that was not ended. Raises as :meth:`delete`."""
        key = self.key(name)
        begun = await self.call("list_multipart_uploads", Prefix=key)
        for upload in begun.get("Uploads", ()):
            if upload["Key"] == key:  # not those of names that begin alike
                await self.call("abort_multipart_upload", Key=key, UploadId=upload["UploadId"])
        await self.delete(name)

    def close(self) -> None:
        """Ends the connections. A call that hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._connecting:
            if self._connected is not None:
                self._connected.close()

    async def call(self, operation: str, **fields: object) -> dict[str, Any]:
        """An operation of the service.

        Raises:
            NotFound: there is no such file.
            EngineFailed: it does not do it, also after several tries.
        """
        return await self._run(lambda: getattr(self._client(), operation)(Bucket=self._bucket, **fields))

    async def _run(self, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except MissingExtra:
            raise
        except Exception as error:  # as in check
            response = getattr(error, "response", None) or {}
            if response.get("Error", {}).get("Code") == "NoSuchKey":
                raise NotFound(f"the content of a file is not in --files-root {self._place}") from error
            raise EngineFailed(f"--files-root {self._place} failed: {error}") from error

    def _client(self) -> Any:
        with self._connecting:
            if self._connected is None:
                self._connected = _connect()
            return self._connected


def _connect() -> Any:
    """Raises MissingExtra: boto3 is not installed. What it says of settings that make no sense comes as it is."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise MissingExtra("--files-root s3://... needs boto3: pip install 'modelbus[s3]'") from error
    for name in ("boto3", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below that it writes down what requests are signed with
    config = Config(
        connect_timeout=_CONNECT_S, read_timeout=_READ_S, max_pool_connections=_THREADS,
        retries={"mode": "standard", "total_max_attempts": _TRIES},
    )  # fmt: skip
    # S3 wants a region in signatures; services that have none take any.
    session = boto3.session.Session()
    return session.client("s3", config=config, region_name=session.region_name or "us-east-1")
