"""The forms that a chat request asks for: tools, ``response_format``, and how far they are sought. Pure."""

from __future__ import annotations

from typing import Any

from modelbus.structure.schema_output import asked_schema
from modelbus.structure.tool_calls import tool_forms
from modelbus_broker.errors import InvalidRequest, UnsupportedField
from modelbus_broker.messages import Ladder

from .checks import Need, decimal, integer, not_one_of
from .openai_types import ChatRequest

MAX_REASKS = 10


def from_functions(request: ChatRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """The deprecated ``functions`` and ``function_call`` as tools and a choice among them. Raises InvalidRequest."""
    if request.tools or request.tool_choice is not None:
        raise InvalidRequest("'functions' and 'tools' cannot be used together.", param="functions")
    tools = [{"type": "function", "function": function} for function in request.functions or ()]
    choice = request.function_call
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "auto", "none"):
        raise not_one_of("function_call", choice, ("auto", "none"))
    return tools, choice


def checked_tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, param: str
) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """Tools and the choice among them, None where there are none; ``param`` is what the client calls them.

    Raises InvalidRequest or UnsupportedField.
    """
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


def checked_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """None where any text will do. Raises InvalidRequest."""
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


def checked_ladder(
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
