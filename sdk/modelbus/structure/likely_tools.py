"""Which tool a request asks for, told by how likely the request is where that tool is wanted.

Small models call the tool that they saw first or last, whatever was asked. They tell much better what a user of a given tool
would say: of "Tool: get weather. Tells the weather in a city. What does the user say?" the words "Do I need an umbrella?" are
likelier than of the other tools. This is the noisy channel of Min et al., "Noisy Channel Language Model Prompting for Few-Shot
Text Classification" (ACL 2022). Of three sets of 24 requests SmolLM2-135M so meets 24, 20 and 21, by itself 20, 16 and 9
(``make bench ARGS="structure"``). It takes one reading of the request per tool, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from modelbus_broker.messages import ChatMessage, Usage

from .replies import summed
from .tool_calls import ToolCallsOutput
from .tool_prompts import ToolForm

#: The natural logarithm of the probability that a conversation is answered with a text, and what it took to know.
Likelihood = Callable[[list[ChatMessage], str], Awaitable[tuple[float, Usage]]]

#: With more tools than this the model chooses by itself; of a longer request its end is looked at.
MOST_TOOLS, MOST_CHARS = 32, 2000


async def likeliest(
    output: ToolCallsOutput, messages: Sequence[ChatMessage], likelihood: Likelihood
) -> tuple[ToolCallsOutput, Usage]:
    """The same output with the tool that is meant as the only one, and what it took to choose it.

    As it was, where there is nothing to choose, or something was answered already: what "Make it 20 minutes later." or the results of
    a tool ask for, the conversation before says. Raises what ``likelihood`` raises.
    """
    said = asked_for(messages)
    if not said or not 1 < len(output.forms) <= MOST_TOOLS:
        return output, Usage()
    found = [await likelihood(question(form), said) for form in output.forms]
    scores = [score for score, _ in found]
    return output.only(scores.index(max(scores))), summed([usage for _, usage in found])


def asked_for(messages: Sequence[ChatMessage]) -> str:
    """The words of the user that a tool is called for; "": the conversation does not end with some, or has answers in it."""
    last = messages[-1] if messages else None
    if last is None or last.role != "user" or any(turn.role in ("assistant", "tool", "function") for turn in messages):
        return ""
    return last.text()[-MOST_CHARS:]


def question(form: ToolForm) -> list[ChatMessage]:
    """The conversation that a request for this tool would be the answer to."""
    words = f"Tool: {form.name.replace('_', ' ')}. {form.description}".strip()
    return [ChatMessage(role="user", content=f"{words} What does the user say?")]
