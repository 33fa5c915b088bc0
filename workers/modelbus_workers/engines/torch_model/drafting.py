"""Guesses at the next tokens: the model reads several at once and keeps those that it would have chosen itself.

Two ways to guess: a smaller model of the same vocabulary (assisted decoding, https://arxiv.org/abs/2211.17192), and the
text itself, which answers often repeat (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding). The
choosing stays what it is, so an answer has the tokens that it would have without guesses, sampled ones too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from modelbus_broker.errors import ConfigurationError

from .batch import is_plain
from .settings import TransformersSettings

if TYPE_CHECKING:
    from .loading import TextModel

#: The longest run of tokens that is looked for in the text.
_LONGEST_LOOKUP = 3


class Drafter(Protocol):
    """Guesses for one sequence."""

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What may follow all tokens so far, prompt included: at most so many, perhaps none."""
        ...


@dataclass
class DraftCounts:
    """For the metrics."""

    guessed: int = 0
    kept: int = 0


class Drafting:
    """Makes the drafters of a deployment. For the thread that runs the model."""

    def __init__(self, settings: TransformersSettings, assistant: Any | None) -> None:
        self._settings, self._assistant = settings, assistant
        self.counts = DraftCounts()

    def drafter(self) -> Drafter:
        if self._assistant is not None:
            return _Assistant(self._assistant, self._settings)
        return _Lookup(self._settings.prompt_lookup_num_tokens)


class _Lookup:
    """The last place where the text had its last tokens: what followed there may follow again."""

    def __init__(self, count: int) -> None:
        self._count = count
        #: Where in the text what follows a run of tokens begins: the newest place, but not that of the text's end.
        self._places: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def guess(self, tokens: list[int], most: int) -> list[int]:
        for end in range(self._seen + 1, len(tokens)):
            for length in range(1, min(_LONGEST_LOOKUP, end) + 1):
                self._places[tuple(tokens[end - length : end])] = end
        self._seen = max(self._seen, len(tokens) - 1)
        for length in range(min(_LONGEST_LOOKUP, len(tokens)), 0, -1):
            at = self._places.get(tuple(tokens[-length:]))
            if at is not None:
                return tokens[at : at + min(self._count, most)]
        return []


class _Assistant:
    """A smaller model that goes on greedily, as long as it is sure enough."""

    def __init__(self, model: Any, settings: TransformersSettings) -> None:
        self._model = model
        self._count, self._sure = settings.num_assistant_tokens, settings.assistant_confidence_threshold
        self._cache: Any = None
        self._read: list[int] = []

    def guess(self, tokens: list[int], most: int) -> list[int]:
        import torch

        # What it has read of its own guesses may have come otherwise.
        same = min(len(self._read), len(tokens) - 1)
        while self._read[:same] != tokens[:same]:
            same -= 1
        if self._cache is not None and same < len(self._read):
            self._cache.crop(same - len(self._read))
        self._read = tokens[:same]
        guesses: list[int] = []
        for _ in range(min(self._count, most)):
            unread = (tokens + guesses)[len(self._read) :]
            options = {"past_key_values": self._cache} if self._cache is not None else {}
            answer = self._model(
                input_ids=torch.tensor([unread], device=self._model.device), use_cache=True, logits_to_keep=1, **options
            )
            self._cache = answer.past_key_values
            self._read = self._read + unread
            likelihoods = answer.logits[0, -1].float().softmax(0)
            guess = int(likelihoods.argmax())
            if float(likelihoods[guess]) < self._sure:
                break
            guesses.append(guess)
        return guesses


def make_drafting(settings: TransformersSettings, loaded: TextModel) -> Drafting | None:
    """What the deployment asks for; None if nothing.

    Raises:
        ConfigurationError: it cannot be done with this model, or a parameter is wrong.
        DeploymentFailed: the assistant cannot be loaded.
    """
    if not settings.assistant_model and not settings.prompt_lookup_num_tokens:
        return None
    if settings.assistant_model and settings.prompt_lookup_num_tokens:
        raise ConfigurationError("assistant_model and prompt_lookup_num_tokens are two ways to guess: choose one")
    if settings.continuous_batching:
        raise ConfigurationError(
            "continuous_batching reads a token of each request at once, guesses several of one: choose one"
        )
    if settings.prompt_lookup_num_tokens < 0 or settings.num_assistant_tokens < 1:
        raise ConfigurationError(
            "prompt_lookup_num_tokens must not be negative, num_assistant_tokens must be at least 1"
        )
    if not 0 <= settings.assistant_confidence_threshold <= 1:
        raise ConfigurationError("assistant_confidence_threshold is a probability, from 0 to 1")
    _check_goes_back(loaded.model, "this model")
    return Drafting(settings, _load_assistant(settings, loaded) if settings.assistant_model else None)


def _load_assistant(settings: TransformersSettings, loaded: TextModel) -> Any:
    from .loading import load_assistant

    model, tokenizer = load_assistant(settings, loaded.device)
    if tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ConfigurationError(
            f"assistant_model {settings.assistant_model} has other tokens than the model: its guesses would mean nothing"
        )
    _check_goes_back(model, f"assistant_model {settings.assistant_model}")
    return model


def _check_goes_back(model: Any, what: str) -> None:
    """Guesses that were wrong must be taken out of the cache, which plain keys and values allow."""
    import torch

    with torch.inference_mode():
        answer = model(input_ids=torch.tensor([[3, 5, 7]], device=model.device), use_cache=True)
    if not is_plain(getattr(answer, "past_key_values", None)):
        raise ConfigurationError(
            f"{what} keeps more than plain keys and values, so it cannot take back what was guessed wrong"
        )
