"""vLLM's own parsers of reasoning and of tool calls: which one is a model's, and how they read an answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
from modelbus_broker.errors import ConfigurationError
from modelbus_broker.messages import Chat, ToolCallDelta

from ..torch_model.call_formats import ToolParser
from ..torch_model.call_parser import Piece

#: Words that only this family's templates have, and the name of its parser in vLLM.
_CALLS = (
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<seed:tool_call>", "seed_oss"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<arg_key>", "glm45"),
    ("<parameter=", "qwen3_xml"),
    ("<|tool_call|>", "granite"),
)
#: By the beginning of ``model_type``; "": all others, if their template opens the reasoning for them.
_REASONING = (
    ("qwen3", "qwen3"),
    ("glm4", "glm45"),
    ("minimax", "minimax_m2"),
    ("kimi", "kimi_k2"),
    ("seed_oss", "seed_oss"),
    ("deepseek_v3", "deepseek_r1"),
)


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """Which parsers of vLLM read a model's answers; "": none."""

    reasoning: str = ""
    calls: str = ""


def choose_names(folder: Path, template: str, reasoning: str, calls: str) -> Names:
    """The parsers of a model.

    Args:
        template: its chat template.
        reasoning: what the deployment says: a name of vLLM's, ``none`` or ``auto``.
        calls: the same for calls, where the names that this project reads itself count as none.

    Raises:
        ConfigurationError: vLLM has no parser of this name.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if reasoning == "auto":
        reasoning = _reasoning_of(_model_type(folder), template)
    if calls == "auto":
        calls = next((name for words, name in _CALLS if words in template), "")
    own = get_args(ToolParser)
    reasoning = "" if reasoning == "none" else reasoning
    calls = "" if calls in own else calls
    _check("reasoning_parser", reasoning, ReasoningParserManager.list_registered(), ["auto", "none"])
    _check("tool_parser", calls, ToolParserManager.list_registered(), own)
    return Names(reasoning=reasoning, calls=calls)


def _check(param: str, name: str, known: Iterable[str], also: Iterable[str]) -> None:
    names = [*known, *also]
    if name and name not in names:
        near = difflib.get_close_matches(name, names) or sorted(names)
        raise ConfigurationError(f"{param} cannot be {name}; it can be {', '.join(near)}")


def _reasoning_of(model_type: str, template: str) -> str:
    if "<seed:think>" in template:
        return "seed_oss"
    if "</think>" not in template:
        return ""
    for beginning, name in _REASONING:
        if model_type.startswith(beginning):
            return name
    opened = "<think>" in template.rpartition("add_generation_prompt")[2]
    return "deepseek_r1" if opened else ""


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""  # vLLM tells of it in its own words


class Readers:
    """Makes a reader for each choice of each request to one model."""

    def __init__(self, names: Names, tokenizer: Any, model_config: Any) -> None:
        """Raises ConfigurationError if this model's vocabulary has not the words that a parser looks for."""
        from vllm.parser.parser_manager import ParserManager

        self.names = names
        self._tokenizer = tokenizer
        self._model_config = model_config
        try:
            self._parsers = {
                calls: ParserManager.get_parser(
                    tool_parser_name=names.calls if calls else None,
                    reasoning_parser_name=names.reasoning or None,
                    enable_auto_tools=calls,
                    is_harmony=model_config.hf_config.model_type == "gpt_oss",
                    tokenizer=tokenizer,
                )
                for calls in {False, bool(names.calls)}
            }
        except Exception as error:  # parsers raise what they like
            parser = " and ".join(name for name in (names.reasoning, names.calls) if name)
            raise ConfigurationError(f"vLLM's parser {parser} cannot read this model: {error}") from error

    def for_task(self, task: Chat, *, calls: bool) -> ReaderFactory | None:
        """What reads the answers to a task; ``calls``: they may have calls in a form that only vLLM knows."""
        parser = self._parsers.get(calls)
        if parser is None:
            return None
        return ReaderFactory(parser, self._tokenizer, self._model_config, task, calls)


class ReaderFactory:
    """Makes the readers of one request."""

    def __init__(self, parser: Any, tokenizer: Any, model_config: Any, task: Chat, calls: bool) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        self._parser, self._tokenizer, self._model_config = parser, tokenizer, model_config
        self.options: Mapping[str, Any] = task.chat_template_kwargs or {}
        self._request = ChatCompletionRequest(
            messages=[], tools=task.tools if calls else None, tool_choice="auto" if calls else None,
            chat_template_kwargs=dict(self.options),
        )  # fmt: skip
        # Some look for words that are hidden from the text elsewhere.
        self.shows_special = not self._made().adjust_request(self._request.model_copy()).skip_special_tokens

    def kept(self) -> dict[int, str]:
        """Special tokens that are text for these readers."""
        added = self._tokenizer.added_tokens_decoder
        return {number: token.content for number, token in added.items() if token.special} if self.shows_special else {}

    def reader(self, prompt: list[int], call_id: Callable[[int], str]) -> VllmReader:
        return VllmReader(self._made(), self._request, prompt, call_id)

    def _made(self) -> Any:
        return self._parser(
            self._tokenizer,
            self._request.tools,
            chat_template_kwargs=dict(self.options),
            model_config=self._model_config,
        )


class VllmReader:
    """One choice, read by vLLM's parsers; see ``torch_model.reading.Reader``."""

    def __init__(self, parser: Any, request: Any, prompt: list[int], call_id: Callable[[int], str]) -> None:
        self._parser, self._request, self._prompt, self._call_id = parser, request, prompt, call_id
        self._reasoned = parser.reasoning_parser is not None and not parser.is_reasoning_end(prompt)
        self._reads_calls = bool(request.tools)
        self._named: set[int] = set()

    @property
    def reasons(self) -> bool:
        return self._reasoned

    def add(self, token: int, text: str) -> Piece:
        return self._read(text, [token], finished=False)

    def finish(self, text: str) -> Piece:
        return self._read(text, [], finished=True)

    def _read(self, text: str, tokens: list[int], *, finished: bool) -> Piece:
        if not self._reasoned and not self._reads_calls:
            return Piece(text)
        said = self._parser.parse_delta(text, tokens, self._request, prompt_token_ids=self._prompt, finished=finished)
        if self._reasoned and (tokens or text):
            self._reasoned = not self._parser._stream_state.reasoning_ended
        if said is None:
            return Piece()
        calls = [self._call(call) for call in said.tool_calls or ()]
        return Piece(said.content or "", calls, said.reasoning or "")

    def _call(self, call: Any) -> ToolCallDelta:
        function = call.function
        begins = call.index not in self._named
        self._named.add(call.index)
        return ToolCallDelta(
            index=call.index,
            # vLLM's are by chance; a run that goes on must name the same call the same.
            id=self._call_id(call.index) if begins else "",
            name=(function.name or "") if function is not None else "",
            arguments=(function.arguments or "") if function is not None else "",
        )
