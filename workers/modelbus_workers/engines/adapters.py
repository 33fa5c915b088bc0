"""An adapter's folder, read and checked: LoRA weights as PEFT saves them, in safetensors and nothing else."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
from modelbus_broker.errors import AdapterUnavailable
from modelbus_broker.messages import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterFiles(msgspec.Struct, frozen=True):
    """What lies in the folder."""

    config: dict[str, Any]
    weights: bytes
    fingerprint: str  #: 16 hex digits of all bytes of both files


class AdapterReader:
    """Reads adapters; the fingerprint of files that have not changed since is remembered. For use in one thread at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def fingerprint(self, adapter: Adapter) -> str:
        """Raises what ``read`` raises."""
        state = self._state(adapter)
        known = self._known.get(adapter.path)
        if known is None or known[0] != state:
            known = self._known[adapter.path] = state, self._read(adapter).fingerprint
        self._compare(adapter, known[1])
        return known[1]

    def read(self, adapter: Adapter) -> AdapterFiles:
        """All of it, from one look at the files.

        Raises:
            AdapterUnavailable: it is not here, not in a form that is read, or not what the request means.
        """
        found = self._read(adapter)
        self._compare(adapter, found.fingerprint)
        return found

    def refuse(self, adapter: Adapter, why: str) -> AdapterUnavailable:
        """The error that says why, and on which host."""
        return AdapterUnavailable(
            f"adapter {adapter.name!r} of model {self._model!r} cannot be used on host {socket.gethostname()}: {why}"
        )

    def _state(self, adapter: Adapter) -> tuple[int, ...]:
        """Other files have another one."""
        state: tuple[int, ...] = ()
        for file in self._files(adapter):
            try:
                found = os.stat(file)
            except OSError as error:
                raise self.refuse(adapter, f"{file}: {error.strerror}") from None
            state += found.st_ino, found.st_size, found.st_mtime_ns
        return state

    def _files(self, adapter: Adapter) -> tuple[Path, Path]:
        folder = Path(adapter.path).expanduser()
        if not folder.is_dir():
            raise self.refuse(adapter, f"there is no folder {adapter.path}")
        if not (folder / CONFIG).is_file():
            raise self.refuse(adapter, f"{adapter.path} has no {CONFIG}")
        if not (folder / WEIGHTS).is_file():
            pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]
            why = f"{adapter.path} has no {WEIGHTS}"
            if pickled:
                why += f" but a {pickled[0]}, which may run code when it is loaded: save it as safetensors"
            raise self.refuse(adapter, why)
        return folder / CONFIG, folder / WEIGHTS

    def _read(self, adapter: Adapter) -> AdapterFiles:
        try:
            said, weights = (file.read_bytes() for file in self._files(adapter))
        except OSError as error:
            raise self.refuse(adapter, f"{error.filename}: {error.strerror}") from None
        try:
            config = msgspec.json.decode(said, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise self.refuse(adapter, f"{CONFIG}: {error}") from None
        if config.get("peft_type") != "LORA":
            raise self.refuse(
                adapter, f"its peft_type is {config.get('peft_type')!r}; only 'LORA' is laid over a model"
            )
        length = struct.unpack("<Q", weights[:8])[0] if len(weights) >= 8 else -1
        if not 0 <= length <= len(weights) - 8 or not _is_json(weights[8 : 8 + length]):
            raise self.refuse(adapter, f"{WEIGHTS} is no safetensors file, or not all of it")
        digest = hashlib.sha256(b"%d\0" % len(said) + said)
        digest.update(weights)
        return AdapterFiles(config, weights, digest.hexdigest()[:16])

    def _compare(self, adapter: Adapter, found: str) -> None:
        if adapter.fingerprint not in ("", found):
            raise self.refuse(adapter, f"the files at {adapter.path} are not those that were added: add it again")


def _is_json(header: bytes) -> bool:
    try:
        msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return False
    return True
