"""What the workers of a model can do about forms, and the rung on which that puts a question. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec
from modelbus_broker.errors import UnsupportedField
from modelbus_broker.messages import Capabilities, Ladder

#: The rungs on which a question may begin.
Start = Literal["native", "grammar", "prompted"]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What can be relied on, whichever worker takes the request."""

    native_schema: bool = False  #: ``response_format`` is the provider's own
    native_tools: bool = False  #: tools are the model's own
    grammar: bool = False  #: the engine holds the model to a schema
    prefill: bool = False  #: the model goes on with a last message of the assistant
    likelihoods: bool = False  #: the engine says how likely a text is as an answer

    def rung(self, ladder: Ladder, *, tools: bool) -> Start:
        """The best rung that there is and that may be taken; ``tools``: for calls of tools.

        Raises:
            UnsupportedField: there is none.
        """
        has: dict[Start, bool] = {
            "native": self.native_tools if tools else self.native_schema,
            "grammar": self.grammar,
            "prompted": True,
        }
        for rung, there in has.items():
            if there and rung in ladder.rungs:
                return rung
        wanted = "tools" if tools else "response_format"
        raise UnsupportedField(
            f"the model's workers have none of the ways that the ladder allows ({', '.join(ladder.rungs) or 'none'})",
            param=wanted,
        )

    def chooses_tool(self, ladder: Ladder) -> bool:
        """Of several tools the likeliest is offered alone. Only where a grammar runs: without one, examples of several tools are
        what teaches a small model how a call looks."""
        return ladder.likely_tool and self.likelihoods and self.rung(ladder, tools=True) == "grammar"


def profile_of(capabilities: Capabilities) -> Profile:
    """Of one worker, or of what all workers of a model have in common: of a mixed set the weakest decides."""
    return Profile(
        native_schema=capabilities.json_schema and not capabilities.grammar,
        native_tools=capabilities.tools and capabilities.native_tools,
        grammar=capabilities.json_schema and capabilities.grammar,
        prefill=capabilities.prefill,
        likelihoods="decision" in capabilities.tasks,
    )
