"""Text to tokens and back by the vocabulary in the file, and its chat template.

``GgufTokenizer`` has the methods of Hugging Face's tokenizers that the text side of ``torch_model`` calls.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import llama_cpp
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from modelbus_broker.errors import ConfigurationError, EngineFailed

from ..torch_model.grammar import Grammars
from .library import Loaded


class GgufTokenizer:
    """The vocabulary of a model, for any thread: the library only reads it."""

    def __init__(self, loaded: Loaded, chat_format: str = "") -> None:
        """Raises ConfigurationError: there is no chat format of this name."""
        self._vocab = loaded.vocab
        self._piece = lru_cache(maxsize=65_536)(self._read_piece)
        bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.bos_token_id: int | None = bos if bos >= 0 else None
        self.ends = frozenset(
            token for token in range(loaded.vocabulary) if llama_cpp.llama_vocab_is_eog(self._vocab, token)
        )
        self._formatter = _chat_formatter(chat_format) if chat_format else None
        raw = llama_cpp.llama_model_chat_template(loaded.model, None)
        self.chat_template: str = chat_format or (raw.decode("utf-8", "replace") if raw else "")
        self._template = None if self._formatter else _environment().from_string(self.chat_template)
        self._words = {
            name: self._piece(token, True).decode("utf-8", "replace") if token >= 0 else ""
            for name, token in (("bos_token", bos), ("eos_token", int(llama_cpp.llama_vocab_eos(self._vocab))))
        }

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, special=add_special_tokens)}

    def encode(self, text: str, *, special: bool) -> list[int]:
        """``special``: the tokens that the model wants at the beginning or end of a text are added."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), tokens, room, special, True)
        if count < 0:
            raise EngineFailed(f"llama.cpp cannot tokenize a text of {len(raw)} bytes")
        return list(map(int, tokens[:count]))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_options: object) -> str:
        return b"".join(self._piece(token, not skip_special_tokens) for token in ids).decode("utf-8", "replace")

    def grammars(self) -> Grammars:
        """What holds answers to grammars; takes up to seconds to make."""
        from llguidance import LLTokenizer

        pieces = []
        for token in range(int(llama_cpp.llama_vocab_n_tokens(self._vocab))):
            piece, kind = self._read_piece(token, True), llama_cpp.llama_vocab_get_attr(self._vocab, token)
            looks_special = piece.startswith(b"<") and piece.endswith(b">")
            special = kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL or (
                kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED and looks_special
            )
            pieces.append(b"\xff" + piece if special else piece)  # the mark by which grammars know them
        tokenize = ctypes.cast(llama_cpp.llama_cpp._lib.llama_tokenize, ctypes.c_void_p).value
        made: Any = LLTokenizer  # its types do not know this constructor
        read = made.from_llamacpp(
            tokens=pieces, vocab_ptr=self._vocab, tokenize_fptr=tokenize, eos_token=sorted(self.ends) or None
        )
        return Grammars(read)

    def piece(self, token: int) -> bytes:
        """The bytes of a token, be it special or not."""
        return self._piece(token, True)

    def _read_piece(self, token: int, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def stops(self) -> list[str]:
        """Texts that end an answer in the deployment's chat format."""
        if self._formatter is None:
            return []
        stop = self._formatter(messages=[{"role": "user", "content": ""}]).stop
        return [stop] if isinstance(stop, str) else list(stop or ())

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        chat_template: None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        messages: None = None,
        bos_token: None = None,
        eos_token: None = None,
        **options: Any,
    ) -> dict[str, list[int]]:
        """The conversation as token ids; the names of the parameters are those that a request may not set."""
        if self._formatter is not None:
            text = str(self._formatter(messages=conversation).prompt)
        else:
            assert self._template is not None
            text = self._template.render(
                messages=conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._words,
                **options,
            )
        if continue_final_message:
            last = conversation[-1]["content"].strip()
            at = text.rfind(last)
            if at < 0:
                raise ValueError("the template changes the last message, so it cannot be gone on with")
            text = text[: at + len(last)]
        bos = self._words["bos_token"]
        return {"input_ids": self.encode(text, special=not (bos and text.startswith(bos)))}


class TokenTexts:
    """The text and the bytes of single tokens, for log probabilities."""

    def __init__(self, tokenizer: GgufTokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> tuple[str, list[int]]:
        raw = self._tokenizer.piece(token)
        return raw.decode("utf-8", "replace"), list(raw)


class _Generation(Extension):
    """``{% generation %}`` tells trainers which part the model writes; it changes nothing."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _chat_formatter(name: str) -> Callable[..., Any]:
    from llama_cpp import llama_chat_format

    spelled = {"llama-2": "llama2", "llama-3": "llama3"}.get(name, name).replace("-", "_")
    prefix = "format_"
    found = getattr(llama_chat_format, prefix + spelled, None)
    if found is None:
        known = sorted(other.removeprefix(prefix) for other in dir(llama_chat_format) if other.startswith(prefix))
        raise ConfigurationError(f"there is no chat_format {name!r}; known are: {', '.join(known)}")
    formatter: Callable[..., Any] = found
    return formatter
