"""Images, audio and files as values of prompt functions: rendered, they become content parts of the message."""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from modelbus_broker.errors import PromptError
from modelbus_broker.messages import AudioData, AudioPart, FileData, FilePart, ImagePart, ImageURL
from modelbus_broker.messages.chat import Part

#: How files begin, and what they are then.
_IMAGES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"))
_AUDIO = ((b"ID3", "mp3"), (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"OggS", "ogg"), (b"fLaC", "flac"))


class Content:
    """What is no text and stands in a prompt as a part of its own: an ``Image``, ``Audio`` or ``File``."""

    def part(self) -> Part:
        """As it stands in a message."""
        raise NotImplementedError


@dataclass(frozen=True, init=False, repr=False)
class Image(Content):
    """An image. ``Image(Path("cat.png"))``, ``Image(data)`` and ``Image("https://...")`` make one.

    A text is always an address (``https:``, ``http:`` or ``data:``), so that a text from a user names no file of this
    host. An address is passed on: the model's host fetches it, where its engine does that at all.

    Raises:
        PromptError: the text is no address, the file cannot be read, or its bytes are no known kind of image.
    """

    url: str
    detail: str = "auto"  #: ``low``, ``high`` or ``auto``: how closely the model looks

    def __init__(self, source: str | bytes | Path, *, media_type: str = "", detail: str = "auto") -> None:
        if isinstance(source, str):
            url = _address(source, "Image")
        else:
            data = _read(source)
            url = _data_url(data, media_type or _image_type(data, source))
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "detail", detail)

    def __repr__(self) -> str:
        return f"Image({_short(self.url)})"

    def part(self) -> Part:
        return ImagePart(image_url=ImageURL(url=self.url, detail=self.detail))


@dataclass(frozen=True, init=False, repr=False)
class Audio(Content):
    """A recording: ``Audio(Path("words.wav"))`` or ``Audio(data, format="mp3")``.

    Raises:
        PromptError: the file cannot be read, or neither its bytes nor its name tell its format.
    """

    data: bytes
    format: str  #: ``wav``, ``mp3``, ...

    def __init__(self, source: bytes | Path, *, format: str = "") -> None:
        data = _read(source)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "format", format or _audio_format(data, source))

    def __repr__(self) -> str:
        return f"Audio({self.format}, {len(self.data)} bytes)"

    def part(self) -> Part:
        return AudioPart(input_audio=AudioData(data=base64.b64encode(self.data).decode(), format=self.format))


@dataclass(frozen=True, init=False, repr=False)
class File(Content):
    """A document: ``File(Path("report.pdf"))`` or ``File(data, name="report.pdf")``.

    Raises:
        PromptError: the file cannot be read, or bytes come without a name.
    """

    data: bytes
    name: str

    def __init__(self, source: bytes | Path, *, name: str = "") -> None:
        if not name and isinstance(source, bytes):
            raise PromptError("a File of bytes needs a name: File(data, name='report.pdf')")
        object.__setattr__(self, "data", _read(source))
        object.__setattr__(self, "name", name or Path(str(source)).name)

    def __repr__(self) -> str:
        return f"File({self.name!r}, {len(self.data)} bytes)"

    def part(self) -> Part:
        media_type = mimetypes.guess_type(self.name)[0] or "application/octet-stream"
        return FilePart(file=FileData(file_data=_data_url(self.data, media_type), filename=self.name))


def _address(text: str, kind: str) -> str:
    if text.startswith(("https://", "http://", "data:")):
        return text
    raise PromptError(
        f"{kind}({_short(text)}) is no https, http or data address; a file of this host is {kind}(pathlib.Path(...))"
    )


def _read(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, Path):
        raise PromptError(f"bytes or a pathlib.Path are wanted, not {type(source).__name__}")
    try:
        return source.read_bytes()
    except OSError as error:
        raise PromptError(f"{source} cannot be read: {error.strerror or error}") from error


def _image_type(data: bytes, source: bytes | Path) -> str:
    found = next((kind for begin, kind in _IMAGES if data.startswith(begin)), "")
    if not found and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = "image/webp"
    if not found and isinstance(source, Path):
        guessed = mimetypes.guess_type(source.name)[0] or ""
        found = guessed if guessed.startswith("image/") else ""
    if not found:
        raise PromptError("the bytes are no known kind of image: say it, Image(data, media_type='image/...')")
    return found


def _audio_format(data: bytes, source: bytes | Path) -> str:
    found = next((kind for begin, kind in _AUDIO if data.startswith(begin)), "")
    if not found and data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        found = "wav"
    if not found and isinstance(source, Path):
        found = source.suffix.removeprefix(".").lower()
    if not found:
        raise PromptError("the bytes are no known kind of audio: say it, Audio(data, format='wav')")
    return found


def _data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
