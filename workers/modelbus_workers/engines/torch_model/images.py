"""The images of a conversation: taken from data URLs, or fetched where the deployment allows it, and decoded within limits."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from modelbus_broker.errors import InvalidRequest
from modelbus_broker.messages import Chat, ImagePart

if TYPE_CHECKING:
    from aiohttp import ClientSession

#: What is decoded: the kinds that the OpenAI API takes. Other decoders of the library are not reached.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
#: A file of a few bytes can say that it is larger than the memory.
_MOST_PIXELS = 50_000_000
_FETCH_S = 20.0


class ImageLimits(Protocol):
    """What a deployment says of the images in its requests."""

    @property
    def max_images(self) -> int:
        """Most of one request."""
        ...

    @property
    def max_image_mb(self) -> int:
        """Size of a file in MiB."""
        ...

    @property
    def allowed_media_domains(self) -> str:
        """Hosts that images are fetched from, separated by commas."""
        ...


def image_places(task: Chat) -> Iterator[tuple[str, ImagePart]]:
    """The images in the order of the conversation, each with its place, for error texts."""
    for number, message in enumerate(task.messages):
        for index, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                yield f"messages[{number}].content[{index}].image_url", part


async def image_bytes(task: Chat, settings: ImageLimits) -> list[tuple[str, bytes]]:
    """The files of all images, each with its place.

    Raises:
        InvalidRequest: too many, too large, not to be fetched; ``param`` names the place.
    """
    places = list(image_places(task))
    if len(places) > settings.max_images:
        raise InvalidRequest(
            f"at most {settings.max_images} images are read in one request, not {len(places)}", param="messages"
        )
    if all(part.image_url.url.startswith("data:") for _, part in places):
        return [(at, _from_data_url(part.image_url.url, at, settings)) for at, part in places]
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_FETCH_S)) as session:
        return [(at, await _file(session, part.image_url.url, at, settings)) for at, part in places]


def decode_image(at: str, data: bytes) -> Any:
    """An RGB picture (``PIL.Image.Image``); of a moving one the first frame.

    Raises:
        InvalidRequest: it is none, or too large.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise InvalidRequest(
                    f"the image has {width} x {height} pixels; at most {_MOST_PIXELS} are decoded", param=at
                )
            return image.convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # decoders raise what they like
        raise InvalidRequest(f"the image cannot be read as {', '.join(_FORMATS)}: {error}", param=at) from error


async def _file(session: ClientSession, url: str, at: str, settings: ImageLimits) -> bytes:
    if url.startswith("data:"):
        return _from_data_url(url, at, settings)
    return await _fetched(session, url, at, settings)


def _from_data_url(url: str, at: str, settings: ImageLimits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("a data URL of an image has the form data:image/png;base64,...", param=at)
    if len(body) * 3 // 4 > settings.max_image_mb << 20:
        raise _too_large(at, settings)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"the data URL is no base64: {error}", param=at) from error


async def _fetched(session: ClientSession, url: str, at: str, settings: ImageLimits) -> bytes:
    """The worker's own network is reached here, so only the hosts that the deployment names are asked, and none that they name."""
    import aiohttp

    host = (urlsplit(url).hostname or "").lower()
    allowed = {name.strip().lower() for name in settings.allowed_media_domains.split(",") if name.strip()}
    if not url.startswith(("http://", "https://")) or not (host in allowed or "*" in allowed):
        raise InvalidRequest(
            f"images are not fetched from {host or url[:40]!r}: send a data URL, "
            "or deploy with backend.allowed_media_domains",
            param=at,
        )
    try:
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise InvalidRequest(f"the image's server answered {response.status}", param=at)
            data = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                data += piece
                if len(data) > settings.max_image_mb << 20:
                    raise _too_large(at, settings)
            return bytes(data)
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        raise InvalidRequest(f"the image cannot be fetched: {error or type(error).__name__}", param=at) from error


def _too_large(at: str, settings: ImageLimits) -> InvalidRequest:
    return InvalidRequest(
        f"the image is larger than {settings.max_image_mb} MiB, the limit of this deployment", param=at
    )
