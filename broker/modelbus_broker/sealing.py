"""Secrets on their way from the one who deploys to the node that starts the worker.

They cross the bus as NaCl sealed boxes that only the cluster's node key opens, or as ``env:NAME`` and
``file:PATH``, which mean something on the node alone. PyNaCl is imported on first use.
"""

from __future__ import annotations

import contextlib
import os
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import ConfigurationError

MASK = "***"
_REFERENCES = ("env:", "file:")


def make_seal_key(path: Path) -> str:
    """The private node key (hex, X25519) in this file; makes the file, readable by its owner only, if there is none.

    Raises:
        ConfigurationError: the file holds something else.
    """
    from nacl.public import PrivateKey

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = bytes(PrivateKey.generate()).hex()
    # Written whole under another name and linked: of two processes that start together one wins, none reads half.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(fresh + "\n")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    key = path.read_text().strip()
    public_seal_key(key, where=str(path))
    return key


def public_seal_key(private: str, *, where: str = "the seal key") -> str:
    """The public half (hex) of a private node key (hex).

    Raises:
        ConfigurationError: it is no key. The message names ``where``, never the value.
    """
    from nacl.public import PrivateKey

    try:
        return bytes(PrivateKey(bytes.fromhex(private)).public_key).hex()
    except Exception:
        raise ConfigurationError(f"{where} is not a node key: it must hold 64 hex digits") from None


def seal(public_hex: str, plaintext: str) -> str:
    """``plaintext`` for the holder of the private node key, as base64.

    Raises:
        ConfigurationError: ``public_hex`` is no key.
    """
    from nacl.public import PublicKey, SealedBox

    try:
        key = PublicKey(bytes.fromhex(public_hex))
    except Exception:
        raise ConfigurationError(f"{public_hex!r} is not a public node key") from None
    return b64encode(SealedBox(key).encrypt(plaintext.encode())).decode()


def unseal(private: str, sealed: str) -> str:
    """What was sealed to this key (hex).

    Raises:
        ConfigurationError: it was sealed to another key, or damaged.
    """
    from nacl.public import PrivateKey, SealedBox

    try:
        return SealedBox(PrivateKey(bytes.fromhex(private))).decrypt(b64decode(sealed)).decode()
    except Exception:
        # Without a cause: tracebacks of the library may show what it was given.
        raise ConfigurationError("it was sealed to the key of another cluster: deploy again") from None


def is_reference(value: str) -> bool:
    """Whether the value says where a secret is (``env:NAME``, ``file:PATH``) instead of being one."""
    return value.startswith(_REFERENCES)


def resolve(value: str) -> str:
    """The value itself, or what ``env:NAME`` or ``file:PATH`` stands for on this host. Line ends of a file are cut.

    Raises:
        ConfigurationError: the variable is not set, or the file cannot be read or is empty.
    """
    kind, _, name = value.partition(":")
    if kind == "env":
        found = os.environ.get(name, "")
        if not found:
            raise ConfigurationError(f"the environment variable {name} is not set on this host")
        return found
    if kind == "file":
        try:
            text = Path(name).expanduser().read_text().rstrip("\r\n")
        except UnicodeDecodeError:
            raise ConfigurationError(f"the file {name} is not text") from None
        except OSError as error:
            raise ConfigurationError(f"the file {name} cannot be read: {error.strerror}") from None
        if not text:
            raise ConfigurationError(f"the file {name} is empty")
        return text
    return value


def mask(params: Mapping[str, str], secret_names: Collection[str]) -> dict[str, str]:
    """The parameters for people to see. References stay readable: they are not secret, and help to find a mistake."""
    return {
        name: MASK if name in secret_names and value and not is_reference(value) else value
        for name, value in params.items()
    }
