"""Names that are parts of subjects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelbus_broker import names


@given(st.text(min_size=1))
def test_a_model_token_is_one_safe_subject_token(model: str) -> None:
    token = names.model_token(model)
    assert token.replace("-", "").isalnum() and token.isascii()
    assert len(token) <= 43


@pytest.mark.parametrize(("one", "other"), [("a.b", "a-b"), ("Chat", "chat"), ("a/b", "a b"), ("模型", "模形")])
def test_names_that_look_alike_have_queues_of_their_own(one: str, other: str) -> None:
    assert names.model_token(one) != names.model_token(other)


def test_a_request_id_names_its_publisher_and_its_time() -> None:
    publisher = names.new_publisher_id("gateway")
    request_id = names.new_request_id(publisher)
    assert names.publisher_of(request_id) == publisher
    assert names.started_ms_of(request_id) > 1_700_000_000_000
    assert len({names.new_request_id(publisher) for _ in range(1000)}) == 1000


@pytest.mark.parametrize("text", ["", "abc", "a.b-c-d", "--"])
def test_what_is_no_request_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="request id"):
        names.publisher_of(text)


def test_a_run_s_name_says_attempt_delivery_and_worker() -> None:
    assert names.parse_run(names.run_name(2, 3, "w1")) == (2, 3, "w1")
