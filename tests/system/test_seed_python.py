"""Every Python line of the document that this project is built from, run as it stands there on two engines."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import modelbus
import msgspec
import pydantic
import pytest
from modelbus import hooks
from modelbus_broker.messages import Deployment

from tests.helpers.prompting import shared_bus
from tests.helpers.smollm2 import smollm2

pytest.importorskip("torch")

COPY = Path(__file__).with_name("seed_python.md")
#: What the document takes for granted: an object that asks models, and the two functions of byzerllm's guide.
PREAMBLE = """
import datetime
from typing import Annotated, List
import byzerllm

llm = byzerllm.ByzerLLM.from_default_model("gpt3_5_chat")

def compute_date_range(
    count: Annotated[int, "时间跨度，数值类型"],
    unit: Annotated[str, "时间单位，字符串类型", {"enum": ["day", "week", "month", "year"]}],
) -> List[str]:
    \'\'\'
    计算日期范围
    \'\'\'
    days = {"day": 1, "week": 7, "month": 30, "year": 365}[unit] * count
    now = datetime.datetime.now()
    return [f"{now - datetime.timedelta(days=min(days, 10_000)):%Y-%m-%d %H:%M:%S}", f"{now:%Y-%m-%d %H:%M:%S}"]

def compute_now() -> str:
    \'\'\'
    计算当前时间
    \'\'\'
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
"""


def document() -> Path:
    """The document itself where it is, else our copy of its Python lines."""
    named = os.environ.get("MODELBUS_SEED_DOCUMENT")
    beside = Path(__file__).resolve().parents[3] / "shared" / "seed-document.md"
    return Path(named) if named else beside if beside.exists() else COPY


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(blocks: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Runs the blocks as a notebook would: the names that they make, and what the last line of each is."""
    module = types.ModuleType("seed_document")
    sys.modules[module.__name__] = module
    shown = []
    try:
        for number, block in enumerate([PREAMBLE, *blocks]):
            lines = block.replace("byzerllm", "modelbus").rstrip().splitlines()
            while not lines[-1].strip() or lines[-1].startswith("#"):
                lines.pop()  # the document's own remark on what comes out
            last = lines[-1]
            is_expression = re.fullmatch(r"[\w\[\]().\"\u4e00-\u9fff]+", last) is not None and number > 0
            body = "\n".join(lines[:-1] if is_expression else lines)
            exec(compile(body, f"block {number}", "exec"), module.__dict__)
            shown.append(eval(last, module.__dict__) if is_expression else None)
    finally:
        del sys.modules[module.__name__]
    return module.__dict__, shown[1:]


@pytest.fixture(scope="module", params=["scripted", "smollm2"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = Deployment(name="gpt3_5_chat", model="gpt3_5_chat", revision="1", engine="scripted")
    if request.param == "smollm2":
        folder = {"model_path": str(smollm2()), "pretrained_model_type": "custom/auto"}
        model = msgspec.structs.replace(model, engine="transformers", **folder)
    with shared_bus(tmp_path_factory.mktemp("bus"), {"gpt3_5_chat": model}) as url:
        yield url


def test_our_copy_of_the_lines_is_what_the_document_says() -> None:
    assert blocks(document().read_text()) == blocks(COPY.read_text())


@pytest.mark.timeout(400)
def test_every_python_line_of_the_document_works(
    request: pytest.FixtureRequest, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELBUS_ADDRESS", address)
    try:
        names, (hello, prompt, prompt_of_another, values, story) = run(blocks(document().read_text()))
    finally:
        modelbus.disconnect()

    assert isinstance(hello, str) and hello
    assert prompt == prompt_of_another == "你好，我是modelbus，你是谁？"
    assert isinstance(values, list)
    if (
        request.node.callspec.params["address"] == "scripted"
    ):  # which calls each tool; a small model may choose to call none
        assert values
    for value in values:
        dates = value if isinstance(value, list) else [value]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", date) for date in dates)
    assert isinstance(story, names["Story"]) and isinstance(story, pydantic.BaseModel)
    assert isinstance(names["t"][0], modelbus.LLMClassResponse)


@pytest.mark.timeout(400)
def test_a_conversation_calls_tools_and_goes_on_from_their_results(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELBUS_ADDRESS", address)

    def temperature(city: Literal["Cologne", "Berlin"], unit: Literal["celsius", "kelvin"] = "celsius") -> float:
        """The temperature in a city."""
        return 21.5

    llm = modelbus.Chat(
        "gpt3_5_chat", tools=[temperature], max_rounds=1, at_limit="answer", temperature=0, max_tokens=60
    )
    try:
        run = llm.ask("How warm is it in Cologne?", choice="required")
    finally:
        modelbus.disconnect()

    # What the model wrote was valid, was executed, and its result is in the conversation that the answer goes on from.
    assert [outcome.failure for outcome in run.calls] == [""] * len(run.calls) and run.values
    assert set(run.values) == {21.5}
    assert [message.role for message in run.messages] == ["user", "assistant", *["tool"] * len(run.calls), "assistant"]
    assert run.answer and run.usage.completion_tokens > 0
    assert llm.messages == run.messages


@modelbus.prompt(llm="gpt3_5_chat", temperature=0, max_tokens=24)
def tale(about: str) -> str:
    """Tell a short tale about {{ about }}."""
    return modelbus.context()


@modelbus.prompt(llm="gpt3_5_chat", temperature=0, max_tokens=60)
def colours(thing: str) -> Iterator[Literal["red", "green", "blue"]]:
    """Name the colours of {{ thing }}."""
    return modelbus.context()


def get_weather(city: str) -> str:
    """Tells the weather in a city."""
    return f"rain in {city}"


def play_song(title: str) -> None:
    """Plays a song."""


TOOLS = ((get_weather, play_song), (play_song, get_weather))


@modelbus.prompt(llm="gpt3_5_chat", tools=TOOLS[0], temperature=0, max_tokens=48)
def wanted(request: str) -> modelbus.ToolCall:  # type: ignore[empty-body]
    """{{ request }}"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("address", ["smollm2"], indirect=True)
def test_a_real_model_goes_on_where_its_answer_was_cut(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELBUS_ADDRESS", address)
    try:
        whole = tale("a bus")
        pieces = tale.with_options(max_tokens=8).with_max_turns(3).result("a bus")
        begun = tale.with_options(max_tokens=5).with_return_prefix("The old bus")("a bus")
        stream = colours.with_ladder(max_items=3)("a flag")
        named = list(stream)
        # The worker chooses among tools, so that a hook sees one question, and nothing of it went out before.
        seen: list[hooks.Call] = []
        remove = hooks.before(seen.append)
        calls = [wanted.with_tools(*tools).result("Do I need an umbrella in Hamburg?") for tools in TOOLS]
        remove()
    finally:
        modelbus.disconnect()

    # Word for word what it says in one go, so it was not asked anew.
    assert (pieces.value, pieces.attempts) == (whole, 3)
    assert begun.startswith("The old bus") and len(begun) > len("The old bus")
    assert named == stream.result.value and set(named) <= {"red", "green", "blue"}
    assert stream.result.rung == "grammar"
    assert [(call.value.function.name, call.rung) for call in calls] == [("get_weather", "grammar")] * 2
    assert [type(call) for call in seen] == [hooks.ChatCall] * 2
