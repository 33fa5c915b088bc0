"""From what a client sent to a task on the bus. Pure: no bus, no clock, no settings.

A request that makes no sense raises ``InvalidRequest`` with the field in ``param``, in the words of the OpenAI API.
What only some engines can do becomes a list of needs, which ``check_needs`` holds against the live workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from modelbus.structure.schema_output import asked_schema
from modelbus.structure.tool_calls import tool_forms
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import (
    AudioPart,
    Chat,
    ChatMessage,
    Completion,
    Embedding,
    FilePart,
    ImagePart,
    Ladder,
    Sampling,
    Task,
    ToolCall,
    WorkerRecord,
)

from .bodies import Body
from .checks import Need, decimal, integer, not_one_of, texts, timeout
from .fields import PLACED, PLACED_COMPLETION, RARE_CHAT, RARE_COMPLETION, Field, can
from .openai_types import ChatRequest, CompletionRequest, EmbeddingRequest, RequestMessage

MAX_STOPS = 16
MAX_REASKS = 10


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the gateway goes on with it."""

    task: Task
    needs: Sequence[Need] = ()
    stream: bool = False
    include_usage: bool = False  #: a last event with the usage
    timeout_s: float = 0.0  #: 0 = the deployment's
    logprobs: bool = False  #: the client asked for them
    legacy_functions: bool = False  #: answer with ``function_call`` in place of ``tool_calls``
    base64: bool = False  #: embeddings as base64


CHAT_BODY, COMPLETION_BODY, EMBEDDING_BODY = Body(ChatRequest), Body(CompletionRequest), Body(EmbeddingRequest)


def translate_chat(request: ChatRequest) -> Translation:
    """Raises InvalidRequest or UnsupportedField, with ``param``."""
    needs: list[Need] = []
    extra = _rare_fields(RARE_CHAT.given(request), PLACED, needs)
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens is not None and max_tokens != request.max_completion_tokens:
            raise InvalidRequest(
                "Setting 'max_tokens' and 'max_completion_tokens' to different values is not supported.",
                param="max_completion_tokens",
            )
        max_tokens = request.max_completion_tokens
        integer("max_completion_tokens", max_tokens, 1)
    elif max_tokens is not None:
        integer("max_tokens", max_tokens, 1)
    logprobs: int | None = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
        needs.append(Need("logprobs", "logprobs"))
    if request.top_logprobs is not None:
        integer("top_logprobs", request.top_logprobs, 0, 20)
        if not request.logprobs:
            raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    tools, tool_choice, legacy = request.tools, request.tool_choice, False
    if request.functions or request.function_call is not None:
        tools, tool_choice = _from_functions(request)
        legacy = True
    if tools or tool_choice is not None:
        tools, tool_choice = _tools(tools, tool_choice, "functions" if legacy else "tools")
    if request.parallel_tool_calls is not None and not tools and not request.parallel_tool_calls:
        raise InvalidRequest(
            "'parallel_tool_calls' is only allowed when 'tools' are specified.", param="parallel_tool_calls"
        )
    response_format = _response_format(request.response_format)
    ladder = _ladder(request.ladder, bool(tools) and tool_choice != "none", response_format, needs)
    stream, include_usage = _stream(request)
    return Translation(
        task=Chat(
            messages=_messages(request.messages, needs),
            sampling=_sampling(request, max_tokens, logprobs, needs),
            tools=tools or None,
            tool_choice=tool_choice,
            parallel_tool_calls=request.parallel_tool_calls if tools else None,
            response_format=response_format,
            ladder=ladder,
            reasoning_effort=request.reasoning_effort,
            chat_template_kwargs=request.chat_template_kwargs or None,
            extra=extra,
        ),
        needs=needs,
        stream=stream,
        include_usage=include_usage,
        timeout_s=timeout(request.timeout),
        logprobs=logprobs is not None,
        legacy_functions=legacy,
    )


def translate_completion(request: CompletionRequest) -> Translation:
    """Raises InvalidRequest or UnsupportedField, with ``param``."""
    needs: list[Need] = []
    given = RARE_COMPLETION.given(request)
    if request.best_of is not None and request.best_of == (request.n or 1):
        given = [(field, value) for field, value in given if field.name != "best_of"]
    extra = _rare_fields(given, PLACED_COMPLETION, needs)
    if request.max_tokens is not None:
        integer("max_tokens", request.max_tokens, 0 if request.echo else 1)
    if request.logprobs is not None:
        integer("logprobs", request.logprobs, 0, 20)
        needs.append(Need("logprobs", "logprobs"))
    if request.prompt is None:
        raise InvalidRequest("Missing required parameter: 'prompt'.", param="prompt")
    stream, include_usage = _stream(request)
    return Translation(
        task=Completion(
            prompt=texts(request.prompt, "prompt", needs),
            sampling=_sampling(request, request.max_tokens, request.logprobs, needs),
            echo=bool(request.echo),
            suffix=request.suffix or None,
            extra=extra,
        ),
        needs=needs,
        stream=stream,
        include_usage=include_usage,
        timeout_s=timeout(request.timeout),
        logprobs=request.logprobs is not None,
    )


def translate_embedding(request: EmbeddingRequest) -> Translation:
    """Raises InvalidRequest, with ``param``."""
    needs: list[Need] = []
    if request.dimensions is not None:
        integer("dimensions", request.dimensions, 1)
    if request.encoding_format not in (None, "float", "base64"):
        raise not_one_of("encoding_format", request.encoding_format, ("float", "base64"))
    return Translation(
        task=Embedding(input=texts(request.input, "input", needs), dimensions=request.dimensions),
        needs=needs,
        timeout_s=timeout(request.timeout),
        base64=request.encoding_format == "base64",
    )


def check_needs(needs: Sequence[Need], model: str, workers: Sequence[WorkerRecord]) -> None:
    """Raises UnsupportedField for the first field that no live worker of the model can do.

    Without live workers nothing is known and nothing refused: whether the request may wait is decided later.
    """
    for need in needs:
        able = [worker for worker in workers if can(worker.capabilities, need.capability)]
        if workers and not able:
            engines = ", ".join(sorted({worker.engine for worker in workers}))
            raise UnsupportedField(
                f"'{need.param}' is not supported by the model '{model}' (engine: {engines}).", param=need.param
            )
        workers = able


def _rare_fields(given: list[tuple[Field, Any]], placed: frozenset[str], needs: list[Need]) -> dict[str, Any]:
    """Refuses what must be refused; what engines may know becomes a need and, without a place, an extra."""
    extra = {}
    for field, value in given:
        if field.treatment == "refused":
            raise UnsupportedField(f"'{field.name}' is not supported here: {field.note}.", param=field.name)
        needs.append(Need(field.name, f"field:{field.name}"))
        if field.name not in placed:
            extra[field.name] = value
    return extra


def _sampling(
    request: ChatRequest | CompletionRequest, max_tokens: int | None, logprobs: int | None, needs: list[Need]
) -> Sampling:
    n = 1 if request.n is None else request.n
    if n != 1:
        integer("n", n, 1, 128)
        needs.append(Need("n", "n"))
    if request.temperature is not None:
        decimal("temperature", request.temperature, 0, 2)
    if request.top_p is not None:
        decimal("top_p", request.top_p, 0, 1)
    if request.seed is not None:
        integer("seed", request.seed, -(2**63), 2**63 - 1)
        needs.append(Need("seed", "seed"))
    presence, frequency = request.presence_penalty, request.frequency_penalty
    if presence:
        decimal("presence_penalty", presence, -2, 2)
        needs.append(Need("presence_penalty", "penalties"))
    if frequency:
        decimal("frequency_penalty", frequency, -2, 2)
        needs.append(Need("frequency_penalty", "penalties"))
    if request.logit_bias:
        _logit_bias(request.logit_bias)
        needs.append(Need("logit_bias", "logit_bias"))
    _engine_ranges(request)
    return Sampling(
        n=n,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        stop=_stops(request.stop) if request.stop is not None else [],
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or None,
        logprobs=logprobs,
    )


def _engine_ranges(request: ChatRequest | CompletionRequest) -> None:
    if request.top_k is not None:
        integer("top_k", request.top_k, -1)
    if request.min_p is not None:
        decimal("min_p", request.min_p, 0, 1)
    if request.min_tokens is not None:
        integer("min_tokens", request.min_tokens, 0)
    if request.repetition_penalty is not None and request.repetition_penalty <= 0:
        raise InvalidRequest(
            f"Invalid 'repetition_penalty': expected a value > 0, but got {request.repetition_penalty:g} instead.",
            param="repetition_penalty",
        )


def _logit_bias(biases: dict[str, float]) -> None:
    for token, bias in biases.items():
        if not token.isascii() or not token.isdigit():
            raise InvalidRequest(f"Invalid key in 'logit_bias': {token!r} is no token id.", param="logit_bias")
        decimal(f"logit_bias.{token}", bias, -100, 100)


def _stops(stop: str | list[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"Invalid 'stop': array too long. Expected an array with maximum length {MAX_STOPS}, "
            f"but got an array with length {len(stops)} instead.",
            param="stop",
        )
    if "" in stops:
        raise InvalidRequest("Invalid 'stop': empty string. Expected strings with a minimum length 1.", param="stop")
    return stops


def _stream(request: ChatRequest | CompletionRequest) -> tuple[bool, bool]:
    options = request.stream_options
    if options is None:
        return bool(request.stream), False
    if not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    return True, bool(options.include_usage)


def _messages(messages: list[RequestMessage], needs: list[Need]) -> list[ChatMessage]:
    if not messages:
        raise InvalidRequest(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            param="messages",
        )
    result: list[ChatMessage] = []
    for index, message in enumerate(messages):
        content = message.content
        if content.__class__ is not str or message.role not in _PLAIN_ROLES:
            message = _checked(message, index, needs)
        result.append(message)
    return result


#: Messages of these roles with a text need no second look.
_PLAIN_ROLES = frozenset({"user", "system", "developer"})


def _checked(message: RequestMessage, index: int, needs: list[Need]) -> RequestMessage:
    at = f"messages[{index}]"
    if message.audio is not None:
        raise UnsupportedField(f"'{at}.audio' is not supported here: answers are text.", param=f"{at}.audio")
    calls = message.tool_calls or []
    for number, call in enumerate(calls):
        if call.type != "function":
            param = f"{at}.tool_calls[{number}].type"
            raise UnsupportedField(f"'{param}' {call.type!r} is not supported here: only 'function' is.", param=param)
    if message.content is None:
        spoke = calls or message.function_call or message.refusal is not None or message.reasoning_content is not None
        if message.role != "assistant" or not spoke:
            raise InvalidRequest(
                f"Invalid value for '{at}.content': expected a string or an array of parts, got null.",
                param=f"{at}.content",
            )
    elif not isinstance(message.content, str):
        _parts(message.content, f"{at}.content", needs)
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequest(f"Missing required parameter: '{at}.tool_call_id'.", param=f"{at}.tool_call_id")
    if message.role == "function":
        if not message.name:
            raise InvalidRequest(f"Missing required parameter: '{at}.name'.", param=f"{at}.name")
        return RequestMessage(role="tool", content=message.content, tool_call_id=_legacy_id(message.name))
    if message.function_call is not None:
        call = ToolCall(id=_legacy_id(message.function_call.name), function=message.function_call)
        return msgspec.structs.replace(message, function_call=None, tool_calls=[*calls, call])
    return message


def _legacy_id(function: str) -> str:
    """Deprecated function calls have no id: the name joins a call with its result."""
    return f"call_{function}"


def _parts(parts: Sequence[object], at: str, needs: list[Need]) -> None:
    if not parts:
        raise InvalidRequest(f"Invalid '{at}': empty array. Expected at least one part.", param=at)
    for number, part in enumerate(parts):
        match part:
            case ImagePart():
                if not part.image_url.url.startswith(("https://", "http://", "data:image/")):
                    param = f"{at}[{number}].image_url.url"
                    raise InvalidRequest(
                        f"Invalid '{param}': expected an http(s) URL or a data URL of an image.", param=param
                    )
                needs.append(Need(f"{at}[{number}].image_url", "vision"))
            case AudioPart():
                needs.append(Need(f"{at}[{number}].input_audio", "audio"))
            case FilePart():
                if part.file.file_id is not None:
                    param = f"{at}[{number}].file.file_id"
                    raise UnsupportedField(
                        f"'{param}' is not supported here: no files are kept; send 'file_data'.", param=param
                    )
                needs.append(Need(f"{at}[{number}].file", "files"))


def _from_functions(request: ChatRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    if request.tools or request.tool_choice is not None:
        raise InvalidRequest("'functions' and 'tools' cannot be used together.", param="functions")
    tools = [{"type": "function", "function": function} for function in request.functions or ()]
    choice = request.function_call
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "auto", "none"):
        raise not_one_of("function_call", choice, ("auto", "none"))
    return tools, choice


def _tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, param: str
) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    names = [_function_name(tool, f"{param}[{index}]") for index, tool in enumerate(tools or ())]
    choice_param = "function_call" if param == "functions" else "tool_choice"
    if not names:
        if choice not in (None, "none"):
            raise InvalidRequest(f"'{choice_param}' is only allowed when '{param}' are specified.", param=choice_param)
        return None, None
    tool_forms(tools or ())  # a wrong schema is told before anything is asked
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            return _allowed(tools or [], names, choice)
        if _function_name(choice, choice_param) not in names:
            raise InvalidRequest(
                f"Invalid '{choice_param}': the function is not among those in '{param}'.", param=choice_param
            )
    elif choice not in (None, "none", "auto", "required"):
        raise not_one_of(choice_param, choice, ("none", "auto", "required"))
    return tools, choice


def _function_name(tool: dict[str, Any], at: str) -> str:
    kind = tool.get("type")
    if kind != "function":
        if kind == "custom":
            raise UnsupportedField(
                f"'{at}.type' 'custom' is not supported here: only functions are.", param=f"{at}.type"
            )
        raise not_one_of(f"{at}.type", kind, ("function",))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"Missing required parameter: '{at}.function'.", param=f"{at}.function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"Missing required parameter: '{at}.function.name'.", param=f"{at}.function.name")
    return name


def _allowed(tools: list[dict[str, Any]], names: list[str], choice: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """``allowed_tools`` lets the model see fewer tools; we show it fewer."""
    allowed = choice.get("allowed_tools")
    at = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
        raise InvalidRequest(f"Missing required parameter: '{at}.tools'.", param=f"{at}.tools")
    if allowed.get("mode") not in ("auto", "required"):
        raise not_one_of(f"{at}.mode", allowed.get("mode"), ("auto", "required"))
    wanted = set()
    for index, tool in enumerate(allowed["tools"]):
        if not isinstance(tool, dict):
            raise InvalidRequest(f"Invalid type for '{at}.tools[{index}]': expected an object.", param=f"{at}.tools")
        wanted.add(_function_name(tool, f"{at}.tools[{index}]"))
    if not wanted <= set(names):
        raise InvalidRequest(f"Invalid '{at}.tools': not all of them are in 'tools'.", param=f"{at}.tools")
    return [tool for tool, name in zip(tools, names, strict=True) if name in wanted], str(allowed["mode"])


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            pass
        case "json_schema":
            schema = given.get("json_schema")
            for name, kinds in (("name", str), ("schema", dict)):
                if not isinstance(schema, dict) or not isinstance(schema.get(name), kinds):
                    param = (
                        f"response_format.json_schema.{name}"
                        if isinstance(schema, dict)
                        else "response_format.json_schema"
                    )
                    raise InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
        case _:
            raise not_one_of("response_format.type", kind, ("text", "json_object", "json_schema"))
    asked_schema(given)  # a wrong schema is told before anything is asked
    return given


def _ladder(
    ladder: Ladder | None, tools: bool, response_format: dict[str, Any] | None, needs: list[Need]
) -> Ladder | None:
    """How far a form is sought; None where none is asked for, so that the same question is the same request."""
    if ladder is None or not (tools or response_format):
        return None
    if not ladder.rungs:
        raise InvalidRequest("Invalid 'ladder.rungs': empty array. Expected at least one rung.", param="ladder.rungs")
    integer("ladder.reasks", ladder.reasks, 0, MAX_REASKS)
    integer("ladder.examples", ladder.examples, 0, 2)
    for name in ("max_tokens", "max_string", "max_items"):
        integer(f"ladder.{name}", getattr(ladder, name), 0)
    if ladder.retry_temperature is not None:
        decimal("ladder.retry_temperature", ladder.retry_temperature, 0, 2)
    if "prompted" not in ladder.rungs:
        wanted, param = ("tools", "tools") if tools else ("schema", "response_format")
        needs.append(Need(param, f"rungs:{wanted}:{','.join(ladder.rungs)}"))
    return ladder
