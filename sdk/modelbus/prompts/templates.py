"""Docstrings as templates: Jinja2 in a sandbox, with blocks for roles, rendered to messages.

What a value says is never read as a template, nor as a mark of a role: blocks and parts leave marks in the rendered
text that begin with a word drawn anew for each rendering, so nothing that comes from outside can contain one.
"""

from __future__ import annotations

import json
import re
import secrets
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, get_args

import msgspec
from jinja2 import (
    DictLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
    UndefinedError,
    nodes,
    pass_context,
)
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from modelbus_broker.errors import PromptError
from modelbus_broker.messages import ChatMessage, TextPart
from modelbus_broker.messages.chat import Part, Role

from .values import Content

_ROLES = ("system", "developer", "user", "assistant")
assert set(_ROLES) <= set(get_args(Role))

#: Names in a template's context that are ours.
_MARKS, _SELF = "__marks__", "__self__"


class Template:
    """One prompt's text, compiled. Made by :func:`template_of`."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._compiled = _ENVIRONMENT.from_string(text)
        except TemplateSyntaxError as error:
            raise PromptError(f"the template is wrong in line {error.lineno}: {error.message}") from error

    def messages(self, context: Mapping[str, Any]) -> list[ChatMessage]:
        """The conversation that the template makes of these values. Text outside role blocks is the user's.

        Raises:
            PromptError: a name has no value, or a value is used in a way that the sandbox forbids.
        """
        marks = _Marks()
        values = {**_ENVIRONMENT.globals, **context, _MARKS: marks}
        if "self" in values:
            values[_SELF] = values.pop("self")
        try:
            # What ``Template.render`` does, without copying all names twice.
            rendered = "".join(self._compiled.root_render_func(self._compiled.new_context(values, shared=True)))
        except UndefinedError as error:
            known = ", ".join(sorted(set(context) - {"self"})) or "none"
            raise PromptError(f"{str(error.message).replace(_SELF, 'self')}; the names here: {known}") from error
        except TemplateNotFound as error:
            raise PromptError(f"no other template can be loaded here: {error.name}") from error
        except (TemplateError, OverflowError) as error:
            raise PromptError(str(error)) from error
        if not marks.count:
            return [ChatMessage(role="user", content=rendered)]
        return marks.messages(rendered)


@lru_cache(maxsize=1024)
def template_of(text: str) -> Template:
    """The template of a docstring: its indentation goes as ``textwrap.dedent`` cuts it, and blank lines around it.

    Raises:
        PromptError: its syntax is wrong.
    """
    return Template(dedented(text))


def dedented(text: str) -> str:
    """A docstring without the indentation that it has because of where it stands."""
    first, newline, rest = text.partition("\n")
    body = textwrap.dedent(rest)
    return body.strip("\n").rstrip() if not first.strip() else f"{first.strip()}{newline}{body}".rstrip()


class _Marks:
    """What one rendering has put into the text that is not text."""

    def __init__(self) -> None:
        self.word = ""  #: drawn when it is needed
        self.contents: list[Content] = []
        self.count = 0

    def of_content(self, content: Content) -> str:
        self.contents.append(content)
        return self._mark(f"part {len(self.contents) - 1}")

    def of_turn(self, role: str, body: str) -> str:
        return f"{self._mark(f'role {role}')}{body}{self._mark('end role')}"

    def _mark(self, what: str) -> str:
        self.count += 1
        self.word = self.word or secrets.token_hex(12)
        return f"<{self.word} {what}>"

    def messages(self, rendered: str) -> list[ChatMessage]:
        # Texts and marks take turns: the odd pieces are what the marks say.
        pieces = re.split(f"<{self.word} ([a-z0-9 ]+)>", rendered)
        if len(pieces) != 2 * self.count + 1:
            raise PromptError("a role block or an image went through a filter or an expression that changed its text")
        found: list[ChatMessage] = []
        role, parts, in_block = "user", list[Part](), False
        has_blocks = any(piece.startswith("role ") for piece in pieces[1::2])

        def end() -> None:
            nothing = not parts or (has_blocks and not in_block and all(_is_blank(part) for part in parts))
            if not nothing:
                found.append(ChatMessage(role=role, content=_content(parts)))  # type: ignore[arg-type]  # checked

        for index, piece in enumerate(pieces):
            kind, _, rest = piece.partition(" ")
            if index % 2 == 0:
                if piece:
                    parts.append(TextPart(text=piece))
            elif kind == "part":
                parts.append(self.contents[int(rest)].part())
            else:
                end()
                role, parts, in_block = (rest, [], True) if kind == "role" else ("user", [], False)
        end()
        return found


def _is_blank(part: Part) -> bool:
    return isinstance(part, TextPart) and not part.text.strip()


def _content(parts: list[Part]) -> str | list[Part]:
    if all(isinstance(part, TextPart) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    return parts


class _RoleBlocks(Extension):
    """``{% role "system" %} ... {% endrole %}``; blanks around the tags are not part of any message."""

    tags = {"role"}

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        yield from _without_blanks_at_roles(list(stream))

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        role = parser.parse_expression()
        body = parser.parse_statements(("name:endrole",), drop_needle=True)
        if any(call.name == "_turn" for node in body for call in node.find_all(nodes.ExtensionAttribute)):
            parser.fail("a role block stands inside another one", line)
        turn = self.call_method("_turn", [role, nodes.ContextReference()])
        return nodes.CallBlock(turn, [], [], body).set_lineno(line)

    def _turn(self, role: object, context: Context, caller: Callable[[], str]) -> str:
        if role not in _ROLES:
            raise PromptError(f"{role!r} is no role of a turn; these are: {', '.join(_ROLES)}")
        marks: _Marks = context[_MARKS]
        return marks.of_turn(str(role), caller())


def _without_blanks_at_roles(tokens: list[Token]) -> Iterator[Token]:
    """The tokens of a template: text loses its blanks where it meets a role tag, and ``self`` becomes a name of ours.

    Jinja2 itself would read ``self`` as the template's own blocks.
    """
    after_tag = False
    in_role_tag = False
    for at, token in enumerate(tokens):
        if token.type == "block_begin":
            in_role_tag = tokens[at + 1].value in ("role", "endrole")
        if token.type == "data":
            before_tag = at + 2 < len(tokens) and tokens[at + 1].type == "block_begin"
            before_tag = before_tag and tokens[at + 2].value in ("role", "endrole")
            text = token.value.lstrip() if after_tag else token.value
            text = text.rstrip() if before_tag else text
            token = Token(token.lineno, "data", text)
        elif token.type == "name" and token.value == "self" and tokens[at - 1].type != "dot":
            token = Token(token.lineno, "name", _SELF)
        after_tag = token.type == "block_end" and in_role_tag
        yield token


@pass_context
def _finalize(context: Context, value: object) -> object:
    """What an expression puts into the text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Content):
        marks: _Marks = context[_MARKS]
        return marks.of_content(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Content) for item in value):
        marks = context[_MARKS]
        return "".join(marks.of_content(item) for item in value)
    return value


def as_json(value: object, indent: int | None = None) -> str:
    """Any value that JSON has a form for, pydantic's models too; the filter ``tojson``.

    Jinja2's own writes ``<`` as ``\\u003c``, for web pages.
    """
    return json.dumps(msgspec.to_builtins(value, enc_hook=_plain), ensure_ascii=False, indent=indent)


def _plain(value: Any) -> object:
    dump = getattr(value, "model_dump", None)  # pydantic's
    if dump is None:
        raise PromptError(f"a {type(value).__name__} cannot be written as JSON")
    return dump(mode="json")


#: Nothing private can be reached, nothing given can be changed, and no other template be loaded.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    loader=DictLoader({}),
    undefined=StrictUndefined,
    finalize=_finalize,
    extensions=[_RoleBlocks],
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["tojson"] = as_json
