"""What a return annotation means: the node that has the JSON Schema of its values, and makes one of decoded JSON.

Each kind of annotation is a node with two methods. ``read`` collects what is wrong, with the place of it, so that a
model that is asked again hears of everything at once.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from modelbus_broker.errors import InvalidRequest

from .nodes.base import Node
from .nodes.constraints import annotated
from .nodes.containers import DictNode, ListNode, TupleNode, UnionNode
from .nodes.objects import ObjectNode, PydanticNode, StructNode, is_pydantic, own_doc
from .nodes.scalars import SCALARS, AnyNode, ChoiceNode

_LISTS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list, set: set, frozenset: frozenset, tuple: tuple,
    collections.abc.Sequence: list, collections.abc.MutableSequence: list, collections.abc.Iterable: list,
    collections.abc.Collection: list, collections.abc.Set: set, collections.abc.MutableSet: set,
}  # fmt: skip
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def understand(annotation: Any) -> Node:
    """The node of an annotation.

    Raises:
        InvalidRequest: no answer of a model can become this type.
    """
    return _Understanding().node(annotation)


class _Understanding:
    """Makes nodes; a class that contains itself gets one node."""

    def __init__(self) -> None:
        self._classes: dict[Any, Node] = {}

    def node(self, annotation: Any) -> Node:
        if type(annotation).__name__ == "TypeAliasType":  # `type X = ...` of Python 3.12
            return self.node(annotation.__value__)
        if isinstance(annotation, typing.NewType):
            return self.node(annotation.__supertype__)
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is typing.Annotated:
            return annotated(self.node(args[0]), args[1:])
        if origin in (typing.Required, typing.NotRequired, typing.Final) or str(origin) == "typing.ReadOnly":
            return self.node(args[0])
        if origin is Literal:
            return ChoiceNode([(value, value) for value in args])
        if origin in (Union, types.UnionType):
            return UnionNode([self.node(arg) for arg in args])
        if isinstance(annotation, type) and (scalar := SCALARS.get(annotation)) is not None:
            return scalar
        if annotation is None:
            return SCALARS[type(None)]
        if annotation is Any or annotation is object:
            return AnyNode()
        if (container := self._container(annotation, origin, args)) is not None:
            return container
        if isinstance(origin or annotation, type):
            return self._class(annotation, origin or annotation)
        raise InvalidRequest(f"an answer cannot become {annotation!r}: give a type that JSON can be read into")

    def _container(self, annotation: Any, origin: Any, args: tuple[Any, ...]) -> Node | None:
        kind = origin or annotation
        if kind in (tuple, typing.Tuple) and args:  # noqa: UP006  # both spellings are met
            if len(args) == 2 and args[1] is Ellipsis:
                return ListNode(self.node(args[0]), tuple)
            return TupleNode([self.node(arg) for arg in args] if args != ((),) else [])
        if kind in _LISTS:
            return ListNode(self.node(args[0]) if args else AnyNode(), _LISTS[kind])
        if kind in _MAPPINGS:
            return DictNode(self.node(args[0]) if args else SCALARS[str], self.node(args[1]) if args else AnyNode())
        return None

    def _class(self, annotation: Any, cls: type[Any]) -> Node:
        if annotation in self._classes:
            return self._classes[annotation]
        if issubclass(cls, enum.Enum):
            return ChoiceNode([(member.value, member) for member in cls], cls.__doc__ if own_doc(cls) else "")
        if is_pydantic(cls):
            return PydanticNode(annotation)
        if issubclass(cls, msgspec.Struct):
            return StructNode(annotation)
        if dataclasses.is_dataclass(cls):
            fields = [
                (field.name, field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
                for field in dataclasses.fields(cls)
                if field.init
            ]
        elif typing.is_typeddict(cls):
            # Postponed annotations hide NotRequired from the class itself.
            marks = {typing.Required: True, typing.NotRequired: False}
            fields = [
                (name, marks.get(get_origin(hint), name in cls.__required_keys__))
                for name, hint in typing.get_type_hints(cls, include_extras=True).items()
            ]
        elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
            defaults: dict[str, Any] = getattr(cls, "_field_defaults", {})
            fields = [(name, name not in defaults) for name in getattr(cls, "_fields", ())]
        else:
            raise InvalidRequest(
                f"an answer cannot become {cls.__module__}.{cls.__qualname__}: make it a dataclass, a TypedDict, a pydantic model or a "
                "msgspec Struct"
            )
        node = self._classes[annotation] = ObjectNode(cls)
        arguments = dict(zip(getattr(cls, "__parameters__", ()), get_args(annotation), strict=False))
        hints = typing.get_type_hints(cls, include_extras=True)
        node.fields = [
            (name, self.node(arguments.get(hints[name], hints[name])), required) for name, required in fields
        ]
        return node
