"""How a model that has no way of its own to call tools is told of them.

The words were chosen with a small model (``make bench ARGS="structure"``). What helped it most: the tools shown as the calls
that are wanted, an example of each as a turn of the conversation, and the names once more at the end of the request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from modelbus_broker.messages import ChatMessage

from .instances import instances
from .replies import with_words
from .schemas import Schema, SchemaReader, plain

#: With more tools than this, not each has an example, and the request does not name them all once more.
_MOST_EXAMPLES, _MOST_NAMES = 5, 12


class ToolForm(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a model is told of it."""

    name: str
    description: str = ""
    parameters: Schema
    reader: SchemaReader


def tool_words(forms: Sequence[ToolForm], *, must: bool, parallel: bool, answer: Schema | None) -> str:
    """What the tools are and how one is called.

    Args:
        must: one has to be called.
        parallel: several may be called at once.
        answer: the schema of an answer that calls no tool; None: it is a text.
    """
    lines = [
        "Answer every request with one function call, as JSON."
        if must
        else "Answer every request as JSON: with a function call, if one helps."
    ]
    for form in forms:
        call = {"name": form.name, "arguments": _skeleton(plain(form.parameters))}
        lines.append(f"- {form.description or form.name} {encoded(call)}")
    if parallel:
        lines.append("Several calls at once are a list of such objects.")
    if not must:
        wanted = f"what fits this JSON Schema: {encoded(answer)}" if answer is not None else "your answer"
        lines.append(f'- For everything else {{"answer": {wanted}}}')
    return "\n".join(lines)


def with_tools(
    messages: Sequence[ChatMessage], words: str, forms: Sequence[ToolForm], *, must: bool, examples: int
) -> list[ChatMessage]:
    """The conversation with the words about the tools before it, examples after these, and a reminder at its end."""
    turns = as_texts(messages)
    names = ", ".join([*(form.name for form in forms), *([] if must else ["answer"])])
    reminder = f"Which of {names}? JSON:" if len(forms) <= _MOST_NAMES else "Which function? JSON:"
    shown = list(_example_turns(forms, reminder, must=must)) if examples else []
    if shown:
        words += f"\nThe first {len(shown) // 2} requests are examples."
    head = turns[0] if turns and turns[0].role in ("system", "developer") else None
    if head is not None:
        words, turns = f"{head.text()}\n\n{words}", turns[1:]
    role = head.role if head is not None else "system"
    return with_words([ChatMessage(role=role, content=words), *shown, *turns], reminder, gap="\n")


def _example_turns(forms: Sequence[ToolForm], reminder: str, *, must: bool) -> Iterable[ChatMessage]:
    """A request and its call for each tool, and one that needs none."""
    for number, form in enumerate(forms[:_MOST_EXAMPLES]):
        found = instances(form.parameters, 2)
        if not found:
            continue
        # Neighbours differ, so that the model does not take their values for the ones that are wanted.
        arguments = found[number % len(found)]
        values = ", ".join(value if isinstance(value, str) else encoded(value) for value in arguments.values())
        asked = f"{(form.description or form.name).rstrip('.')}: {values}."
        yield ChatMessage(role="user", content=f"{asked}\n{reminder}")
        yield ChatMessage(role="assistant", content=encoded({"name": form.name, "arguments": arguments}))
    if not must:
        yield ChatMessage(role="user", content=f"Hello!\n{reminder}")
        yield ChatMessage(role="assistant", content=encoded({"answer": "Hello! What can I do for you?"}))


def _skeleton(schema: Any) -> Any:
    """A schema as the value that is wanted, with words in the places of its parts."""
    if not isinstance(schema, dict):
        return "anything"
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        return {name: _skeleton(inner) for name, inner in schema["properties"].items()}
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return [_skeleton(schema["items"])]
    if not schema.keys() & {"type", "enum", "const", "description"}:
        return schema or "anything"  # anyOf, $ref: the schema itself says it shortest
    words = schema.get("description") or (schema.get("type") if isinstance(schema.get("type"), str) else "")
    options = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    limits = [
        f"{name} {schema[name]}"
        for name in ("format", "minimum", "maximum", "minLength", "maxLength")
        if name in schema
    ]
    more = " or ".join([option if isinstance(option, str) else encoded(option) for option in options]) or ", ".join(
        limits
    )
    return f"{words} ({more})".strip() if more else words or "anything"


def as_texts(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The conversation for a model that knows no tools: earlier calls and their results are texts."""
    names: dict[str, str] = {}
    turns: list[ChatMessage] = []
    for message in messages:
        if message.tool_calls:
            written = []
            for call in message.tool_calls:
                names[call.id] = call.function.name
                arguments = call.function.arguments or "{}"
                written.append(f'{{"name": {encoded(call.function.name)}, "arguments": {arguments}}}')
            text = written[0] if len(written) == 1 else f"[{', '.join(written)}]"
            said = message.text()
            turns.append(ChatMessage(role="assistant", content=f"{said}\n{text}" if said else text))
        elif message.role in ("tool", "function"):
            name = names.get(message.tool_call_id or "", message.name or "the tool")
            text = f"Result of {name}: {message.text()}"
            last = turns[-1] if turns else None
            if last is not None and last.role == "user" and last.text().startswith("Result of "):
                turns[-1] = ChatMessage(
                    role="user", content=f"{last.text()}\n{text}"
                )  # templates want turns to alternate
            else:
                turns.append(ChatMessage(role="user", content=text))
        else:
            turns.append(message)
    return turns


def encoded(value: Mapping[str, Any] | Any) -> str:
    """JSON as models read and write it."""
    return json.dumps(value, ensure_ascii=False)
