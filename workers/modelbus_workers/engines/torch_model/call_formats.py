"""The ways in which models write tool calls into their text: a table, and which row is a model's own."""

from __future__ import annotations

from typing import Literal

import msgspec
from modelbus_broker.errors import ConfigurationError

#: What a deployment may say as ``tool_parser``.
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral", "none"]


class CallFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How calls look in a model's text.

    An answer with calls is ``opening``, then calls with ``joint`` between them, then ``closing``. A call is
    ``before_name``, its name, ``before_arguments``, its arguments as a JSON object, and ``after``.
    """

    name: str
    opening: str = ""
    before_name: str
    before_arguments: str
    after: str
    joint: str
    closing: str = ""
    begin: str  #: where this stands in a text, calls begin
    end: str = ""  #: what may stand after a call
    separators: str = " \t\r\n"  #: characters around calls that mean nothing
    repeats: bool = False  #: another call may follow the first without ``begin``
    bare: bool = False  #: an answer may begin with a call, without ``begin``; it may be an ordinary object as well
    name_end: str = ""  #: a name may stand bare before its arguments, up to here
    markers: tuple[
        str, ...
    ] = ()  #: words that are tokens of their own in many vocabularies, hidden from the text there
    short_ids: bool = False  #: the templates want call ids of nine letters and digits

    def written(self, name: str, arguments: str) -> str:
        """One call as the model would write it."""
        return f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after}"


HERMES = CallFormat(
    name="hermes",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after="}\n</tool_call>",
    joint="\n",
    begin="<tool_call>",
    end="</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
)
LLAMA3_JSON = CallFormat(
    name="llama3_json",
    before_name='{"name": "',
    before_arguments='", "parameters": ',
    after="}",
    joint="; ",
    begin="<|python_tag|>",
    separators=" \t\r\n;",
    repeats=True,
    bare=True,
    markers=("<|python_tag|>",),
)
MISTRAL_LIST = CallFormat(
    name="mistral",
    opening="[TOOL_CALLS][",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after="}",
    joint=", ",
    closing="]",
    begin="[TOOL_CALLS]",
    separators=" \t\r\n[,]",
    repeats=True,
    name_end="[ARGS]",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    short_ids=True,
)
#: What newer models of Mistral write; both are read.
MISTRAL_ARGS = msgspec.structs.replace(
    MISTRAL_LIST, opening="", before_name="[TOOL_CALLS]", before_arguments="[ARGS]", after="", joint="", closing=""
)


def knows_tools(template: str) -> bool:
    """Whether a chat template shows the model the tools that it is given."""
    return "tools" in template


def choose_format(template: str, wanted: ToolParser) -> CallFormat | None:
    """The format of a model with this chat template; None: its calls cannot be told from its text.

    A template that knows no tools gets them described in a system text of ours, and that asks for the Hermes form.

    Raises:
        ConfigurationError: the deployment names another format for a template that knows no tools.
    """
    if wanted == "none" or not template:
        return None
    if not knows_tools(template):
        if wanted not in ("auto", "hermes"):
            raise ConfigurationError(
                f"tool_parser is {wanted}, but this model's chat template knows no tools: it can be hermes or none"
            )
        return HERMES
    mistral = MISTRAL_ARGS if "[ARGS]" in template else MISTRAL_LIST
    if wanted == "auto":
        return _recognized(template, mistral)
    return {"hermes": HERMES, "llama3_json": LLAMA3_JSON, "mistral": mistral}[wanted]


def _recognized(template: str, mistral: CallFormat) -> CallFormat | None:
    if "[TOOL_CALLS]" in template:
        return mistral
    if "<tool_call>" in template:
        # Others write something else than JSON between the same words.
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary of argument' in template:
        return LLAMA3_JSON
    return None
