"""Typed answers from any model.

| for | use |
|---|---|
| the answer of a model as a value of a type | ``await answer(client, "chat", "...", Story)`` |
| what a return annotation means | ``output_type(list[Story])`` |
| calls of tools, or a text | ``tool_calls(tools)`` |
| how far the form is sought | ``Ladder`` |
| JSON that is still being written | ``PartialJSON`` |
| being asked again by a validator | raise ``Retry("...")`` |
"""

from __future__ import annotations

from modelbus_broker.errors import OutputError
from modelbus_broker.messages import Ladder, Rung

from .answering import Asks, Result, answer
from .climbing import Ask, Climb
from .instances import instances
from .lenient import Found, NoJSON, find_json
from .nodes.base import Retry
from .output_types import Kind, OutputType, output_type
from .partial import MISSING, Broken, PartialJSON
from .profiles import Profile, profile_of
from .replies import Reply
from .schemas import SchemaReader, bounded, schema_reader
from .tool_calls import Calls, ToolCallsOutput, tool_calls

__all__ = [
    "MISSING", "Ask", "Asks", "Broken", "Calls", "Climb", "Found", "Kind", "Ladder", "NoJSON", "OutputError", "OutputType",
    "PartialJSON", "Profile", "Reply", "Result", "Retry", "Rung", "SchemaReader", "ToolCallsOutput", "answer", "bounded",
    "find_json", "instances", "output_type", "profile_of", "schema_reader", "tool_calls",
]  # fmt: skip
