"""What two workers must share to go on from each other's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_MIB = 1 << 20
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth"}
_SMALL = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


def fingerprint(files: Iterable[Path], *words: str) -> str:
    """16 hex digits of a model's files and of what else decides over its tokens.

    Small files count whole. Of weights count the size and the first and last MiB: reading all of a large model
    would make every start slower by minutes, and weights that differ differ in their header or their last tensor.
    Names of folders do not count, so the same model is the same on every host.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if file.suffix in _WEIGHTS:
            part = _ends(file)
        elif file.suffix in _SMALL:
            part = file.read_bytes()
        else:
            continue
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(hashlib.sha256(part).digest())
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def _ends(file: Path) -> bytes:
    with file.open("rb") as opened:
        first = opened.read(_MIB)
        opened.seek(max(0, file.stat().st_size - _MIB))
        return first + opened.read(_MIB)
