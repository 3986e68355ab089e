"""Draw and grade the missing samples of a set; grading runs while the engine generates."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.chains import FIELD, ChainGrading
from owpo_megatron.evaluation.estimate import ESTIMATORS, Estimate, estimate
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.results import Draw, Results
from owpo_megatron.types import (
    GradingItem,
    Rollout,
    RolloutEngine,
    SampleRequest,
    Sampling,
    Verdict,
    Verifier,
)
from owpo_megatron.verifiers.grading import FAILURES, refuse_failed_grading

# Requests per call of the engine: many times its concurrency, so that little is lost while the last ones end, and few
# enough that their responses (ids and log-probs, until the call returns) fit any memory.
CHUNK = 4096


class DrawProgress(Protocol):
    """Called with the number of samples graded so far, in total, and right so far."""

    def __call__(self, done: int, total: int, right: int) -> None: ...


@dataclass(frozen=True)
class Answering:
    """Engine and verifiers of an evaluation, the same for every set.

    Args:
        decode: converts response ids to text.
        seed: with the indices of problem and sibling it determines a sample's seed, so that models are compared on the
            same draws.
        chains: grades the reasoning of right responses, in sets that ask for it.
    """

    engine: RolloutEngine
    verifier: Verifier
    decode: Callable[[Sequence[int]], str]
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    chains: Verifier | None = None


def identity(prepared: PreparedSet, model: str, max_tokens: int, seed: int) -> dict[str, Any]:
    """Return what determines an evaluation's results; results with the same identity are resumed.

    Args:
        model: fingerprint of the weights.
    """
    spec = prepared.spec
    return {
        "set": spec.name,
        "problems": prepared.fingerprint,
        "samples": spec.samples,
        "pass_at": spec.pass_at,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "max_tokens": max_tokens,
        "rules": sorted(set(prepared.rules.values())),
        "seed": seed,
        "model": model,
    } | _unusual(prepared)


def _unusual(prepared: PreparedSet) -> dict[str, Any]:
    """Fields that most evaluations lack, so that results from before a field existed remain those of its default."""
    found: dict[str, Any] = {"date": prepared.date} if prepared.date else {}
    estimator = prepared.spec.pass_estimator
    found |= {} if estimator == "unbiased" else {"pass_estimator": estimator}
    return found | ({"chain": prepared.spec.chain} if prepared.spec.chain else {})


def sample_seed(seed: int, problem: int, sibling: int) -> int:
    """Hash seed and indices to 31 bits; ~seed keeps them distinct from training's seeds."""
    digest = hashlib.blake2b(f"{~seed}/{problem}/{sibling}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def evaluate_set(
    prepared: PreparedSet, answering: Answering, results: Results, progress: DrawProgress | None = None
) -> dict[str, Any]:
    """Draw and grade the samples that the results lack; write and return the scores (see `scores_of`).

    On any interruption, the responses drawn so far are graded and kept first; only a killed process loses those in
    flight.
    """
    if results.scores is not None:
        return results.scores
    spec, started = prepared.spec, time.monotonic()
    places = [(problem, sibling) for problem in range(len(prepared.prompts)) for sibling in range(spec.samples)]
    missing = [place for place in places if place not in results]
    if progress is not None and len(results):
        progress(len(results), len(places), results.right)
    for start in range(0, len(missing), CHUNK):
        graded = _draw(prepared, answering, results, missing[start : start + CHUNK], progress)
        try:
            refuse_failed_grading([answer for answer, _ in graded], ", ".join(sorted(set(prepared.rules.values()))))
            refuse_failed_grading([chain for _, chain in graded if chain], str(spec.chain), FIELD)
        except UserError:
            results.discard(FAILURES)
            raise
    scores = scores_of(prepared, results.draws(len(prepared.prompts), spec.samples))
    last = {"last_call": {"samples": len(missing), "seconds": round(time.monotonic() - started, 3)}}
    return results.finish(prepared.prompts, spec.samples, scores | last)


def scores_of(prepared: PreparedSet, draws: Sequence[Sequence[Draw]]) -> dict[str, Any]:
    """Compute the scores of a set.

    Returns:
        {"set", "title", "origin", "metrics": {"pass@1": {"value", "low", "high"}}, "problems", "problems_expected",
        "samples", "response_length", "truncated_share", "verdicts"}; with a rule for the reasoning also its verdicts on
        the right responses, "chains", and the metrics cot_pass@k.
    """
    spec = prepared.spec
    flat = [draw for siblings in draws for draw in siblings]
    right = {
        "pass": [sum(draw.reason == "ok" for draw in siblings) for siblings in draws],
        "cot_pass": [sum(draw.chain == "ok" for draw in siblings) for siblings in draws],
    }
    metrics: Mapping[str, Estimate] = {
        name: estimate(
            [ESTIMATORS[spec.pass_estimator](spec.samples, count, k) for count in right[name.partition("@")[0]]]
        )
        for name, k in spec.metrics().items()
    }
    chains = Counter(draw.chain for draw in flat if draw.chain is not None)
    return {
        "set": spec.name,
        "title": spec.title,
        "origin": prepared.origin,
        "problems": len(draws),
        "problems_expected": spec.problems if spec.limit is None else None,
        "samples": spec.samples,
        "metrics": {name: value.to_json() for name, value in metrics.items()},
        "response_length": sum(draw.length for draw in flat) / len(flat),
        "truncated_share": sum(draw.truncated for draw in flat) / len(flat),
        "verdicts": dict(sorted(Counter(draw.reason for draw in flat).items())),
    } | ({"chains": dict(sorted(chains.items()))} if spec.chain else {})


def _draw(
    prepared: PreparedSet,
    answering: Answering,
    results: Results,
    places: Sequence[tuple[int, int]],
    progress: DrawProgress | None,
) -> list[tuple[Verdict, Verdict | None]]:
    """Draw and grade these samples; returns the verdicts of their answers, and of the reasoning of right ones."""
    spec = prepared.spec
    requests = [
        SampleRequest(prepared.prompts[problem], sample_seed(answering.seed, problem, sibling))
        for problem, sibling in places
    ]
    total = len(prepared.prompts) * spec.samples
    chains = answering.chains if spec.chain else None
    under_way: deque[tuple[int, Sequence[Rollout], ChainGrading]] = deque()
    verdicts: list[tuple[Verdict, Verdict | None]] = []

    def settle(wait: bool) -> None:
        for _, _, grading in under_way:
            grading.proceed(wait)
        while under_way and (wait or under_way[0][2].done()):
            first, rollouts, grading = under_way.popleft()
            graded = grading.result()
            verdicts.extend(graded)
            for place, rollout, (verdict, chain) in zip(places[first:], rollouts, graded, strict=False):
                length, truncated = rollout.generated_length, rollout.finish_reason == "length"
                judged = None if chain is None else chain.reason
                results.add(*place, Draw(verdict.reason, length, truncated, rollout.response_ids, judged))
            if progress is not None:
                progress(len(results), total, results.right)

    def finished(first: int, rollouts: Sequence[Rollout]) -> None:
        items = [GradingItem.of(rollout, answering.decode, text=chains is not None) for rollout in rollouts]
        under_way.append((first, rollouts, ChainGrading(items, answering.verifier, chains)))
        settle(wait=False)

    sampling = Sampling(answering.max_tokens, spec.temperature, spec.top_p, answering.stop_token_ids, answering.stop)
    try:
        answering.engine.generate(requests, sampling, finished=finished)
    finally:
        settle(wait=True)
    return verdicts
