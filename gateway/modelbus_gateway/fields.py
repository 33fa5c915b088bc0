"""The table: what the gateway does with every field of a request. Nothing is dropped in silence.

| treatment | meaning |
|---|---|
| supported | it does what the OpenAI API says |
| needs | supported if a live worker of the model has the capability; else 400 that names the field |
| engine | handed to the engine as it is, if a live worker names it (or ``*``) in ``extra_fields``; else 400 |
| no effect | accepted; the answer is what it would be without it |
| refused | 400 that names the field, except for the values that ask for nothing |

Fields that are not in the table are ignored: clients of other servers send many.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Literal

import msgspec
from modelbus.structure.profiles import profile_of
from modelbus_broker.messages import Capabilities

from .openai_types import ChatRequest, CompletionRequest

Route = Literal["chat", "completions", "embeddings"]
Treatment = Literal["supported", "needs", "engine", "no effect", "refused"]


class Field(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    routes: str  #: first letters: c(hat), t(ext completions), e(mbeddings)
    treatment: Treatment
    note: str = ""
    capability: str = ""  #: of ``Capabilities``, for "needs"
    harmless: tuple[Any, ...] = ()  #: values that ask for nothing


def _rows(treatment: Treatment, routes: str, names: str, note: str = "") -> list[Field]:
    return [Field(name, routes, treatment, note) for name in names.split()]


FIELDS: list[Field] = [
    Field("model", "cte", "supported", "a deployed model, `model:adapter`, or a name given with --served-model-name"),
    Field("messages", "c", "supported", "images, audio and files need the capability `vision`, `audio`, `files`; custom tool calls and earlier audio answers are refused"),
    Field("prompt", "t", "supported", "text, token ids (capability `token_prompts`), or a list of either"),
    Field("input", "e", "supported", "text, token ids (capability `token_prompts`), or a list of either"),
    Field("stream", "ct", "supported"),
    Field("stream_options", "ct", "supported", "`include_usage`; `include_obfuscation` has no effect: nothing is padded"),
    Field("max_tokens", "ct", "supported", "without it the engine goes on to the end of the answer or the context; 0 only with `echo`"),
    Field("max_completion_tokens", "c", "supported", "the same as `max_tokens`"),
    Field("temperature", "ct", "supported", "0 to 2"),
    Field("top_p", "ct", "supported", "0 to 1"),
    Field("stop", "ct", "supported", "at most 16 strings"),
    Field("encoding_format", "e", "supported", "`float` or `base64`"),
    Field("dimensions", "e", "supported", "engines that cannot shorten refuse it"),
    Field("timeout", "cte", "supported", "seconds until the answer must be complete; the header X-Request-Timeout says the same"),
    Field("n", "ct", "needs", "1 to 128", "n", (1,)),
    Field("seed", "ct", "needs", "", "seed"),
    Field("presence_penalty", "ct", "needs", "-2 to 2", "penalties", (0,)),
    Field("frequency_penalty", "ct", "needs", "-2 to 2", "penalties", (0,)),
    Field("logit_bias", "ct", "needs", "token id -> -100 to 100", "logit_bias", ({},)),
    Field("logprobs", "ct", "needs", "chat: true or false; completions: 0 to 20", "logprobs", (False,)),
    Field("top_logprobs", "c", "needs", "0 to 20, with `logprobs`", "logprobs"),
    Field("tools", "c", "supported", "functions, by any model ([structured-output.md](structured-output.md)); custom tools are refused"),
    Field("tool_choice", "c", "supported", "`allowed_tools` becomes a shorter list of tools"),
    Field("functions", "c", "supported", "deprecated: becomes `tools`; the answer has `function_call`"),
    Field("function_call", "c", "supported", "deprecated: becomes `tool_choice`"),
    Field("response_format", "c", "supported", "`json_schema` and `json_object`, by any model ([structured-output.md](structured-output.md))"),
    Field("parallel_tool_calls", "c", "supported", "true is the default"),
    Field("ladder", "c", "supported", "of this gateway: how far `response_format` and `tools` are sought ([structured-output.md](structured-output.md))"),
    Field("echo", "t", "engine", "", "", (False,)),
    Field("suffix", "t", "engine", "", "", ("",)),
    Field("reasoning_effort", "c", "engine"),
    Field("chat_template_kwargs", "c", "engine", "", "", ({},)),
    Field("top_k", "ct", "engine"),
    Field("min_p", "ct", "engine", "", "", (0,)),
    Field("min_tokens", "ct", "engine", "", "", (0,)),
    Field("repetition_penalty", "ct", "engine", "", "", (1,)),
    Field("stop_token_ids", "ct", "engine", "", "", ([],)),
    Field("ignore_eos", "ct", "engine", "", "", (False,)),
    Field("service_tier", "c", "engine", "`auto` and `default` are always accepted", "", ("auto", "default")),
    *_rows("engine", "c", "prediction verbosity"),
    *_rows("engine", "c", """
        add_generation_prompt chat_template continue_final_message documents echo enable_search enable_thinking
        include_reasoning mm_processor_kwargs reasoning separate_reasoning thinking thinking_budget
        thinking_token_budget"""),
    *_rows("engine", "t", "prompt_embeds response_format"),
    *_rows("engine", "ct", """
        add_special_tokens allowed_token_ids bad_words cache_salt detokenize early_stopping guided_choice
        guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern
        include_stop_str_in_output length_penalty logits_processors lora_request mirostat mirostat_eta mirostat_tau
        priority prompt_logprobs return_token_ids return_tokens_as_token_ids skip_special_tokens
        spaces_between_special_tokens structured_outputs tfs_z top_a truncate_prompt_tokens typical_p use_beam_search
        vllm_xargs"""),
    *_rows("no effect", "cte", "user", "it names the end user for abuse reports"),
    *_rows("no effect", "c", "safety_identifier", "it names the end user for abuse reports"),
    *_rows("no effect", "c", "metadata", "it labels stored answers, and none is stored"),
    *_rows("no effect", "c", "prompt_cache_key prompt_cache_options prompt_cache_retention", "a hint for caches; engines keep their own"),
    Field("store", "c", "refused", "answers are not stored", "", (False,)),
    Field("modalities", "c", "refused", "answers are text", "", (["text"],)),
    Field("best_of", "t", "refused", "1, or the value of `n`, asks for nothing more", "", (1,)),
    *_rows("refused", "c", "audio", "answers are text"),
    *_rows("refused", "c", "moderation", "there is no moderation model behind it"),
    *_rows("refused", "c", "web_search_options", "models do not search the web here; give them a tool that does"),
]  # fmt: skip


def row(name: str, route: Route) -> Field:
    """The row of one field of one route. Raises KeyError when there is none."""
    return _BY_ROUTE[route][name]


_LETTER: dict[Route, str] = {"chat": "c", "completions": "t", "embeddings": "e"}
_BY_ROUTE: dict[Route, dict[str, Field]] = {
    route: {field.name: field for field in FIELDS if letter in field.routes} for route, letter in _LETTER.items()
}


class RareFields:
    """The fields of one route that most requests do not have, looked at all at once."""

    def __init__(self, route: Route, names: list[str]) -> None:
        self._rows = [row(name, route) for name in names]
        self._values = attrgetter(*names)
        self._absent = (None,) * len(names)

    def given(self, request: ChatRequest | CompletionRequest) -> list[tuple[Field, Any]]:
        """Those that ask for something, with their values."""
        values = self._values(request)
        if values == self._absent:
            return []
        return [
            (field, value)
            for field, value in zip(self._rows, values, strict=True)
            if value is not None and value not in field.harmless
        ]


#: Engine fields that have a place of their own in the task; the others travel in its ``extra``.
PLACED = frozenset({
    "reasoning_effort", "chat_template_kwargs", "top_k", "min_p", "min_tokens",
    "repetition_penalty", "stop_token_ids", "ignore_eos",
})  # fmt: skip
PLACED_COMPLETION = (PLACED & set(_BY_ROUTE["completions"])) | {"echo", "suffix"}


def _rare(route: Route) -> RareFields:
    return RareFields(route, [f.name for f in _BY_ROUTE[route].values() if f.treatment in ("engine", "refused")])


RARE_CHAT, RARE_COMPLETION = _rare("chat"), _rare("completions")


def can(capabilities: Capabilities, capability: str) -> bool:
    """Whether a worker has a capability, serves a task (``task:NAME``), understands an engine field (``field:NAME``), or has
    one of some rungs of the ladder (``rungs:tools:native,grammar``, ``rungs:schema:native``)."""
    kind, colon, name = capability.partition(":")
    if kind == "rungs":
        return _has_rung(capabilities, *name.split(":"))
    if kind == "task":
        return name in capabilities.tasks
    if colon:
        return name in capabilities.extra_fields or "*" in capabilities.extra_fields
    return bool(getattr(capabilities, kind))


def _has_rung(capabilities: Capabilities, wanted: str, rungs: str) -> bool:
    profile = profile_of(capabilities)
    native = profile.native_tools if wanted == "tools" else profile.native_schema
    has = {"native": native, "grammar": profile.grammar, "prompted": True}
    return any(has[rung] for rung in rungs.split(",") if rung)


def table() -> str:
    """The table in Markdown, for the documentation."""
    lines = ["| field | in | treatment | remarks |", "|---|---|---|---|"]
    names = {"c": "chat", "t": "completions", "e": "embeddings"}
    for field in FIELDS:
        routes = ", ".join(names[letter] for letter in field.routes)
        treatment = f"needs `{field.capability}`" if field.capability else field.treatment
        lines.append(f"| `{field.name}` | {routes} | {treatment} | {field.note} |")
    return "\n".join(lines) + "\n"
