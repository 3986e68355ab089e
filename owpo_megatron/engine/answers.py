"""Answers to /generate, checked before anything is made of them: an engine is another program, and may be wrong.

Legend: L tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from owpo_megatron.engine.parsing import columns
from owpo_megatron.engine.routed import read_experts
from owpo_megatron.errors import printable
from owpo_megatron.types import (
    ExpertShape,
    FinishReason,
    Rollout,
    RoutedExperts,
    SampleRequest,
    Sampling,
    TokenIds,
    TokenValues,
)

UNKNOWN_VERSION = -1
FOREIGN_VERSION = -2  # of weights that another owner pushed
# A token less likely than this cannot be drawn in float32. Above 0 lies what rounding leaves of a probability of 1.
LOWEST_LOGP, HIGHEST_LOGP = -200.0, 1e-3
_FINISHED = ("stop", "length")


class BadAnswer(ValueError):
    """An answer that no engine with the right weights gives to this request."""


@dataclass(frozen=True)
class Expected:
    """Facts about the answers that are known beforehand; None: not known, and not checked."""

    vocab_size: int | None = None
    version: int | None = None  # of the weights that were pushed
    owner: str = ""  # who pushed them, as `version_name` adds it to their version
    may_be_cut: bool = False  # a sample may have been ended by `EngineClient.cut`, also before its first token
    experts: ExpertShape | None = None  # of the model; None: nobody asks for experts


def read_answers(
    answers: Any, requests: Sequence[SampleRequest], sampling: Sampling, expected: Expected
) -> list[Rollout]:
    """Build the rollouts of a request for several samples, in order.

    Raises:
        BadAnswer: there is not one answer per request, or one of them is refused by `read_answer`.
    """
    if isinstance(answers, dict) and len(requests) == 1:
        answers = [answers]
    if not isinstance(answers, list):
        raise BadAnswer(f"no list of {len(requests)} answers but {shown(answers)}")
    if len(answers) != len(requests):
        raise BadAnswer(f"{len(answers)} answers to {len(requests)} requests")
    return [
        read_answer(answer, one, one.sampling or sampling, expected)
        for answer, one in zip(answers, requests, strict=True)
    ]


def read_answer(
    answer: Any, request: SampleRequest, sampling: Sampling | None = None, expected: Expected | None = None
) -> Rollout:
    """Build a rollout from the server's own token ids and log-probs.

    Raises:
        BadAnswer: a field is missing; ids and log-probs do not belong together; there is no token, or more than were
            allowed; an id is outside the vocabulary; a log-prob is not finite, or not that of a token that was drawn;
            the sample was aborted, though nobody cut it; it was drawn with other weights than those pushed.
    """
    try:
        meta = answer["meta_info"]
        if expected is not None and expected.may_be_cut and _is_empty(answer):
            return Rollout(request.prompt, TokenIds([]), TokenValues([]), UNKNOWN_VERSION, "abort", request.seed)
        told_logps, told_ids = columns(meta["output_token_logprobs"])
        logps, ids = TokenValues(told_logps), TokenIds(told_ids)
        told = TokenIds(answer["output_ids"])
        reason = meta["finish_reason"]["type"]
        if expected is not None and expected.may_be_cut and reason == "abort":
            reason = _end_of(ids, sampling)
        told_spans = meta.get("weight_versions")
        owner = expected.owner if expected else ""
        version = version_of(told_spans[-1]["version"] if told_spans else meta["weight_version"], owner)
        versions = tuple((version_of(one["version"], owner), one["end"] - one["start"]) for one in told_spans or ())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise BadAnswer(f"what is no sample: {shown(answer)}") from error
    rollout = Rollout(
        prompt=request.prompt,
        response_ids=ids,
        behaviour_logp=logps,
        policy_version=version,
        finish_reason=reason,
        seed=request.seed,
        versions=versions if len(versions) > 1 else (),
    )
    if ids != told or len(ids) != len(logps):
        raise BadAnswer(f"ids and log-probs of prompt {request.prompt.id} that do not belong together: {shown(answer)}")
    fault = _fault(rollout, ids, logps, sampling, expected or Expected())
    if fault is not None:
        raise BadAnswer(f"{fault} to prompt {request.prompt.id}: {shown(answer)}")
    if sampling is None or not sampling.experts:
        return rollout
    return replace(rollout, experts=_experts(meta, rollout, expected or Expected()))


def _experts(meta: Any, rollout: Rollout, expected: Expected) -> RoutedExperts:
    assert expected.experts is not None, "Fleet.check_experts is called before experts are asked for"
    tokens = len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1
    try:
        return read_experts(meta.get("routed_experts"), tokens, expected.experts)
    except ValueError as error:
        raise BadAnswer(f"{error}, to prompt {rollout.prompt.id}") from error


def _end_of(ids: TokenIds, sampling: Sampling | None) -> FinishReason:
    """Return how a sample that was cut ended: its last token may have completed it, and SGLang reports "abort" then."""
    if sampling is not None and ids[-1] in sampling.stop_token_ids:
        return "stop"
    return "length" if sampling is not None and len(ids) == sampling.max_tokens else "abort"


def _is_empty(answer: Any) -> bool:
    """Whether the sample was cut while it waited for its turn; SGLang gives its tokens to no list then, or to one."""
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] != "abort":
        return False
    return not answer["output_ids"] or not meta.get("output_token_logprobs")


def _fault(
    rollout: Rollout, ids: TokenIds, logps: TokenValues, sampling: Sampling | None, expected: Expected
) -> str | None:
    """Return what is wrong with a sample in itself; None: nothing."""
    if rollout.finish_reason not in _FINISHED and not (expected.may_be_cut and rollout.finish_reason == "abort"):
        return f"the finish reason {shown(repr(rollout.finish_reason))}"
    length = len(ids)
    if not length:
        return "no tokens"
    if sampling is not None and length > sampling.max_tokens:
        return f"{length} tokens of {sampling.max_tokens} allowed"
    low, high = int(ids.numpy().min()), int(ids.numpy().max())
    if low < 0 or (expected.vocab_size is not None and high >= expected.vocab_size):
        return f"the token id {low if low < 0 else high}, outside the vocabulary,"
    logp_L = logps.numpy()
    wrong_L = logp_L[~((logp_L >= LOWEST_LOGP) & (logp_L <= HIGHEST_LOGP))]  # NaN compares as false
    if len(wrong_L):
        return f"the log-prob {wrong_L[0]:g} of a token that was drawn"
    if sum(count for _, count in rollout.spans) != length:
        return f"weight versions {rollout.versions} of {length} tokens"
    if FOREIGN_VERSION in (rollout.policy_version, *(version for version, _ in rollout.versions)):
        return "a sample of weights that another program loaded into the engine,"
    if expected.version is not None and rollout.policy_version != expected.version:
        return f"a sample of the weights {rollout.policy_version}, though {expected.version} were pushed,"
    return None


def version_name(version: int, owner: str = "") -> str:
    """Return the name under which a server keeps its weights: two runs at the same step have other weights.

    Example:
        >>> version_name(3), version_name(3, "9f2c"), version_of("3-9f2c", "9f2c"), version_of("3-77aa", "9f2c")
        ('3', '3-9f2c', 3, -2)
    """
    return f"{version}-{owner}" if owner and version != UNKNOWN_VERSION else str(version)


def version_of(name: Any, owner: str = "") -> int:
    """Return the number in a server's name of its weights; UNKNOWN_VERSION where there is none.

    Args:
        owner: who must have pushed them; FOREIGN_VERSION where another did.
    """
    text = str(name)
    if owner:
        text, _, other = text.partition("-") if not text.startswith("-") else (text, "", "")
        if other != owner:
            return FOREIGN_VERSION if other else UNKNOWN_VERSION
    return int(text) if text.lstrip("-").isdigit() else UNKNOWN_VERSION


def shown(answer: Any, limit: int = 120) -> str:
    """Return the beginning of an answer, as it is put into a message."""
    text = printable(answer) if isinstance(answer, str) else repr(answer)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
