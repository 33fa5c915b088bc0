"""Every message survives the bus, and a newer sender is understood."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelbus_broker import messages
from modelbus_broker.messages import Frame, Message, Row, Usage, decode_frames, encode

ALL: list[type[msgspec.Struct]] = sorted(
    (
        item
        for name in messages.__all__
        if isinstance(item := getattr(messages, name), type) and issubclass(item, Message | Row)
        if item not in (Message, Row)
    ),
    key=lambda cls: cls.__name__,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def values_of(kind: Any, inside: frozenset[type] = frozenset()) -> st.SearchStrategy[Any]:
    """Any value of a type, after the description that msgspec itself has of it.

    Args:
        inside: structs that this value is in; those that may hold others of their kind hold none there.
    """
    match kind:
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.fixed_dictionaries({field.name: values_of(field.type, inside | {cls}) for field in fields}).map(
                lambda data: cls(**data)
            )
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([values_of(one, inside) for one in types])
        case msgspec.inspect.ListType(item_type=msgspec.inspect.StructType(cls=cls)) if cls in inside:
            return st.just([])
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(values_of(item, inside), max_size=3)
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(values_of(item, inside), max_size=3).map(tuple)
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values_of(key), values_of(value), max_size=3)
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case msgspec.inspect.StrType():
            return st.text()
        case msgspec.inspect.BytesType():
            return st.binary(max_size=50)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return st.integers(-(2**63), 2**63 - 1)
        case msgspec.inspect.FloatType():
            return st.floats(allow_nan=False)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.AnyType():
            return JSON
    raise AssertionError(f"no strategy for {kind}")


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: str(cls.__name__))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_message_survives_encoding_and_decoding(cls: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(cls)))
    assert msgspec.msgpack.decode(encode(message), type=cls) == message


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: str(cls.__name__))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fields_that_a_newer_sender_added_are_ignored(cls: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(values_of(msgspec.inspect.type_info(cls)))
    plain = msgspec.msgpack.decode(encode(message))
    newer = [*plain, "new", {"x": 1}] if isinstance(plain, list) else {**plain, "a_new_field": {"x": [1]}}
    assert msgspec.msgpack.decode(encode(newer), type=cls) == message


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: str(cls.__name__))
def test_messages_are_frozen(cls: type[msgspec.Struct]) -> None:
    assert cls.__struct_config__.frozen


def test_tags_of_one_channel_differ() -> None:
    frames = msgspec.inspect.type_info(list[Frame])
    assert isinstance(frames, msgspec.inspect.ListType)
    union = frames.item_type
    assert isinstance(union, msgspec.inspect.UnionType)
    tags = [one.tag for one in union.types if isinstance(one, msgspec.inspect.StructType)]
    assert len(set(tags)) == len(tags) == 7


def test_a_list_of_frames_is_one_message() -> None:
    frames = [
        messages.Accepted(id="g1-0-a", run="1.1.w", seq=0, ack_subject="$JS.ACK"),
        messages.Delta(id="g1-0-a", run="1.1.w", seq=1, text="hé"),
        messages.Done(id="g1-0-a", run="1.1.w", seq=2, usage=Usage(prompt_tokens=1)),
    ]
    assert decode_frames(encode(frames)) == frames
