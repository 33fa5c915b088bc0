"""Prompt functions without a model: what they declare, render and copy."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import modelbus
import pytest
from modelbus.errors import ConfigurationError, PromptError
from modelbus.prompts import AsyncPromptFunction, AsyncStreamFunction, PromptFunction, StreamFunction
from modelbus_broker.messages import ChatMessage

if TYPE_CHECKING:
    from collections.abc import Sequence as OnlyForCheckers


@modelbus.prompt(llm="chat", temperature=0)
def hello(name: str, times: int = 2) -> str:
    """Hello, I am {{ name }}, {{ times }} times."""


@modelbus.prompt(llm="chat")
def dated(name: str) -> str:
    """{{ name }} on {{ day }}"""
    return modelbus.context(day="Monday", name=name.upper())


class Shop:
    """Sells things."""

    def __init__(self, llm: str) -> None:
        self.llm = llm

    @modelbus.prompt(llm=lambda self: self.llm)
    def offer(self, thing: str) -> str:
        """{{ self.llm }} sells {{ thing }}"""

    @modelbus.prompt(llm=lambda self: self.llm)
    async def ask(self, thing: str) -> str:
        """{{ thing }} {{ price }}"""
        return modelbus.context(price=3)


def test_the_prompt_alone_needs_no_model() -> None:
    assert hello.prompt("Ann") == "Hello, I am Ann, 2 times."
    assert hello.prompt(name="Ann", times=3) == "Hello, I am Ann, 3 times."


def test_a_call_is_bound_as_python_binds_it() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        hello.prompt()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nam'"):
        hello.prompt(nam="Ann")  # type: ignore[call-arg]


def test_it_looks_like_the_function_that_it_was_made_of() -> None:
    assert (hello.__name__, hello.__doc__) == ("hello", "Hello, I am {{ name }}, {{ times }} times.")
    assert repr(hello).endswith("test_function.hello>")


def test_it_is_copied_and_pickled_as_functions_are() -> None:
    assert copy.copy(hello) is hello and copy.deepcopy([hello])[0] is hello
    assert pickle.loads(pickle.dumps(hello)) is hello
    shop = Shop("tea")
    for other in (copy.deepcopy(shop.offer), pickle.loads(pickle.dumps(shop.offer))):
        assert other.prompt("cups") == "tea sells cups"
    assert pickle.loads(pickle.dumps(Shop.offer)) is Shop.offer
    for changed in (hello.with_options(temperature=1), shop.offer.with_options(temperature=1)):
        with pytest.raises(pickle.PicklingError, match="call with_... there"):
            pickle.dumps(changed)


def test_a_decorator_without_parentheses_says_so() -> None:
    with pytest.raises(PromptError, match=r"write @modelbus.prompt\(\) above .*greet"):

        @modelbus.prompt
        def greet(name: str) -> str:
            """Hello {{ name }}"""


def test_the_body_may_return_more_names_which_go_before_the_arguments() -> None:
    assert dated.prompt("Ann") == "ANN on Monday"


def test_a_body_that_returns_anything_else_is_an_error() -> None:
    @modelbus.prompt(llm="chat")
    def wrong() -> str:
        """x"""
        return "an answer"

    with pytest.raises(PromptError, match="the answer comes from the model"):
        wrong.prompt()


def test_a_method_knows_its_object_and_asks_its_model() -> None:
    shop = Shop("small")

    assert shop.offer.prompt("tea") == "small sells tea"
    assert shop.offer.render("tea").model == "small"
    assert Shop.offer.render(Shop("big"), "tea").model == "big"
    assert shop.ask.prompt("tea") == "tea 3", "a body that awaits nothing"


async def test_a_body_that_awaits_is_rendered_by_awaiting() -> None:
    @modelbus.prompt(llm="chat")
    async def looked_up(name: str) -> str:
        """{{ found }}"""
        await asyncio.sleep(0)
        return modelbus.context(found=name * 2)

    with pytest.raises(PromptError, match="aio_render"):
        looked_up.prompt("x")
    assert (await looked_up.aio_render("x")).messages[0].text() == "xx"


def test_every_with_gives_a_copy_and_changes_nothing() -> None:
    before = hello.render("Ann")

    copies = [
        hello.with_llm("other"), hello.with_options(max_tokens=3, lane="lo"), hello.with_stop("x"),
        hello.with_conversation("before"), hello.with_examples(({"name": "Bob"}, "Hi")), hello.with_return_prefix("P"),
        hello.with_max_turns(3), hello.with_ladder(reasks=0), hello.options({"llm_config": {"max_length": 5}}),
    ]  # fmt: skip

    assert hello.render("Ann") == before
    rendered = [copy.render("Ann") for copy in copies]
    assert all(call != before for call in rendered)
    assert rendered[0].model == "other"
    assert rendered[1].sampling == {"temperature": 0, "max_tokens": 3}
    assert rendered[1].options.lane == "lo"
    assert rendered[2].sampling["stop"] == ["x"]
    assert [message.role for message in rendered[3].messages] == ["user", "user"]
    assert [message.text() for message in rendered[4].messages] == [
        "Hello, I am Bob, 2 times.",
        "Hi",
        before.messages[0].text(),
    ]
    assert (rendered[5].prefix, rendered[6].max_turns, rendered[7].ladder.reasks) == ("P", 3, 0)
    assert rendered[8].sampling == {"temperature": 0, "max_tokens": 5}


def test_a_hundred_threads_with_different_models_never_cross() -> None:
    def work(number: int) -> bool:
        mine = hello.with_llm(f"model-{number}").with_options(seed=number).with_stop(str(number))
        calls = [mine.render(str(number)) for _ in range(20)]
        return all(
            (call.model, call.sampling["seed"], call.sampling["stop"], call.messages[0].text())
            == (f"model-{number}", number, [str(number)], f"Hello, I am {number}, 2 times.")
            for call in calls
        )

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(work, range(100)))
    assert hello.render("x").model == "chat"


def test_history_and_examples_come_after_the_system_turns() -> None:
    @modelbus.prompt(llm="chat")
    def taught(word: str) -> str:
        """{% role "system" %}Translate.{% endrole %}{{ word }}"""

    shown = taught.with_examples(({"word": "Hund"}, "dog"), ("Katze", "cat"))
    told = shown.with_conversation(
        [ChatMessage(role="user", content="before"), {"role": "assistant", "content": "yes"}]
    )

    said = [(message.role, message.text()) for message in told.messages("Maus")]

    assert said == [
        ("system", "Translate."), ("user", "Hund"), ("assistant", "dog"), ("user", "Katze"), ("assistant", "cat"),
        ("user", "before"), ("assistant", "yes"), ("user", "Maus"),
    ]  # fmt: skip
    assert told.prompt("Maus").startswith("[system]\nTranslate.\n\n[user]\nHund")


def test_the_annotation_decides_what_kind_of_function_it_is() -> None:
    @modelbus.prompt()
    async def awaited(x: str) -> str:
        """{{ x }}"""

    @modelbus.prompt()
    def pieces(x: str) -> Iterator[str]:
        """{{ x }}"""

    @modelbus.prompt()
    def later(x: str) -> AsyncIterator[str]:
        """{{ x }}"""

    assert isinstance(hello, PromptFunction)
    assert isinstance(awaited, AsyncPromptFunction)
    assert isinstance(pieces, StreamFunction)
    assert isinstance(later, AsyncStreamFunction)


def test_annotations_may_name_what_is_defined_later_or_for_checkers_only() -> None:
    class Local:
        pass

    @modelbus.prompt(llm="chat")
    def early(x: OnlyForCheckers[str]) -> Later:  # type: ignore[name-defined]  # noqa: F821
        """{{ x }}"""

    assert early.prompt(["a"]) == "['a']"
    with pytest.raises(PromptError, match="'Later' is not defined"):
        early.render(["a"])

    @modelbus.prompt(llm="chat")
    def local() -> list[Local]:
        """x"""

    assert local._reply.annotation == list[Local]


def declare(make: Callable[[], object]) -> Any:
    return modelbus.prompt(llm="chat")(make)


def no_docstring() -> str:
    return ""


def no_annotation():  # type: ignore[no-untyped-def]
    """x"""


def nothing() -> None:
    """x"""


def of_nothing_known() -> Iterator:  # type: ignore[type-arg]
    """x"""


def yields() -> Iterator[str]:
    """x"""
    yield "x"


async def asks_for_the_wrong_iterator() -> Iterator[str]:
    """x"""
    return iter("x")


def bad_template() -> str:
    """{{ x"""
    return ""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_docstring, "no docstring"),
        (no_annotation, "no return annotation"),
        (nothing, "cannot return None"),
        (of_nothing_known, r"Iterator\[str\]"),
        (yields, "yields"),
        (asks_for_the_wrong_iterator, "AsyncIterator"),
        (bad_template, "line 1"),
        ("no function", "above a `def`"),
    ],
)
def test_what_is_no_prompt_function_is_refused_where_it_is_declared(function: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        declare(function)


def test_without_a_model_a_text_function_gives_its_prompt_and_others_say_what_to_do() -> None:
    @modelbus.prompt()
    def text(x: str) -> str:
        """say {{ x }}"""

    assert text("it") == "say it"
    with pytest.raises(PromptError, match=r"names no model: .*with_llm"):
        text.render("it")
    with pytest.raises(PromptError, match="names no model"):
        text.with_return_type(int)("it")


@pytest.mark.parametrize("llm", [3, lambda self: 3, lambda self: modelbus.LLM()])
def test_an_llm_that_is_none_is_refused(llm: Any) -> None:
    with pytest.raises((PromptError, ConfigurationError), match="llm=|no model is named"):
        hello.with_llm(llm).render("Ann")
