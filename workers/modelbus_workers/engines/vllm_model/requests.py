"""A request's fields become vLLM's sampling parameters, or an error that names the field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from modelbus_broker.errors import EngineFailed, InvalidRequest, ModelBusError, WorkerLost

from ..torch_model.answer_form import AnswerForm
from ..torch_model.plan import Plan
from ..torch_model.work import Work
from .stretches import Stretch

#: Fields of other servers that vLLM's ``structured_outputs`` took the place of.
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
#: Fields that travel in a task's ``extra`` and that this engine knows.
EXTRA = ("bad_words", "allowed_token_ids", "prompt_logprobs", "structured_outputs", *_GUIDED)


class Extra(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for beyond the fields that all engines know."""

    bad_words: list[str] = []
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None  #: for vLLM's StructuredOutputsParams


def read_extra(extra: Mapping[str, Any], max_logprobs: int, vocabulary: int) -> Extra:
    """The fields of ``extra``, checked.

    Raises:
        InvalidRequest: a field has a value that it cannot have, or two fields ask for different forms.
    """
    values = {name: value for name, value in extra.items() if name in EXTRA and value is not None}
    forms = [name for name in values if name in _GUIDED or name == "structured_outputs"]
    if len(forms) > 1:
        raise InvalidRequest(f"{' and '.join(forms)} cannot be set at once", param=forms[1])
    for name in forms:
        if name in _GUIDED:
            values["structured_outputs"] = {_GUIDED[name]: values.pop(name)}
    for name in values:
        try:
            msgspec.convert({name: values[name]}, Extra)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{name}: {error}", param=forms[0] if name == "structured_outputs" else name) from None
    read = msgspec.convert(values, Extra)
    check_logprobs(read.prompt_logprobs, max_logprobs, "prompt_logprobs")
    if read.allowed_token_ids is not None and (
        not read.allowed_token_ids or not all(0 <= token < vocabulary for token in read.allowed_token_ids)
    ):
        raise InvalidRequest(f"allowed_token_ids must be token ids in 0 to {vocabulary - 1}", param="allowed_token_ids")
    return read


def check_logprobs(asked: int | None, most: int, param: str) -> None:
    """Raises InvalidRequest if more alternatives are asked for than the deployment allows."""
    if asked is not None and not 0 <= asked <= most:
        raise InvalidRequest(f"{param} must be in 0 to {most}", param=param)


def check_goes_on(work: Work, extra: Extra, *, grammars: bool, biases: bool) -> None:
    """Whether an answer that an earlier run began can be gone on with exactly.

    Args:
        grammars: this vLLM can be told what a grammar has to read first.
        biases: it obeys biases of the logits, by which penalties and bad words go on.

    Raises:
        EngineFailed: it cannot; the message says why.
    """
    if not any(work.output_token_ids):
        return
    plan = work.plan
    penalties = plan.presence_penalty != 0 or plan.frequency_penalty != 0
    causes = [
        (
            "a structured answer under a scheduler_cls of the deployment's own",
            bool(work.form.rules or extra.structured_outputs) and not grammars,
        ),
        ("penalties or bad_words while it decodes speculatively", (penalties or bool(extra.bad_words)) and not biases),
        # They are taken from the logits before vLLM multiplies them.
        ("presence_penalty or frequency_penalty beside repetition_penalty", penalties and plan.repetition_penalty != 1),
    ]
    for words, asked in causes:
        if asked:
            raise EngineFailed(
                f"the worker of this answer was lost, and the vllm engine cannot go on with {words} in the middle: "
                "ask again"
            )


def structured_outputs(form: AnswerForm, extra: Extra) -> dict[str, Any] | None:
    """The arguments of ``StructuredOutputsParams``, if the answer is held to a form.

    Raises:
        InvalidRequest: the request asks for two forms.
    """
    if form.rules and extra.structured_outputs:
        raise InvalidRequest(
            "response_format or tool_choice cannot be set with a structured output", param="response_format"
        )
    return {"grammar": form.grammar} if form.rules else extra.structured_outputs


def sampling_params(
    work: Work,
    number: int,
    extra: Extra,
    *,
    index: int,
    so_far: Sequence[int],
    stretch: Stretch,
    read_first: int,
    prompt_logprobs: int | None,
) -> Any:
    """vLLM's parameters of one choice, as far as it still has to be made.

    Args:
        so_far: its tokens.
        stretch: of the answer, that is to be made.
        read_first: how many of the tokens so far an answer's grammar has to read.

    Raises:
        InvalidRequest: vLLM refuses them.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from .schedulers import READ_FIRST

    plan: Plan = work.plan
    before = len(so_far)
    form = structured_outputs(work.form, extra)
    biases = dict(plan.logit_bias)
    for token, bias in stretch.biases.items():
        biases[token] = biases.get(token, 0.0) + bias
    try:
        return SamplingParams(
            temperature=plan.temperature,
            top_p=plan.top_p,
            top_k=plan.top_k,
            min_p=plan.min_p,
            repetition_penalty=plan.repetition_penalty,
            presence_penalty=plan.presence_penalty,
            frequency_penalty=plan.frequency_penalty,
            logit_bias=biases or None,
            # A run that goes on must not draw again what the first tokens were drawn with.
            seed=None if plan.seed is None else (plan.seed + index + 1_000_003 * before) % (1 << 63),
            min_tokens=max(0, min(plan.min_tokens, work.max_tokens[number]) - before),
            max_tokens=max(1, work.max_tokens[number] - before),
            stop_token_ids=sorted(plan.stop_ids),
            # The tokens that end an answer are all in stop_token_ids.
            ignore_eos=not plan.stop_ids,
            logprobs=plan.logprobs,
            prompt_logprobs=prompt_logprobs,
            bad_words=extra.bad_words or None,
            allowed_token_ids=extra.allowed_token_ids,
            structured_outputs=StructuredOutputsParams(**form) if form else None,
            extra_args={READ_FIRST: read_first} if form and read_first else None,
            # Texts and stop strings are told from the tokens here, so that a run that goes on tells the same.
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (TypeError, ValueError, VLLMClientError) as error:
        raise InvalidRequest(str(error), param="structured_outputs" if form else "") from error


def bad_words(extra: Extra, tokenizer: Any) -> list[list[int]]:
    """The tokens of the words that must not be written, as vLLM compares them."""
    from vllm import SamplingParams

    if not extra.bad_words:
        return []
    params = SamplingParams(bad_words=extra.bad_words)
    with vllm_errors("bad_words"):
        params.update_from_tokenizer(tokenizer)
    return params.bad_words_token_ids or []


@contextmanager
def vllm_errors(param: str = "") -> Iterator[None]:
    """What vLLM raises for one request, as errors of ours with its words; ``param``: the field that it is about."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except ModelBusError:
        raise
    except EngineDeadError as error:
        raise WorkerLost(f"vLLM's engine core has died: {error}") from error
    except (ValueError, VLLMClientError) as error:
        raise InvalidRequest(f"vLLM refuses the request: {error}", param=param) from error
