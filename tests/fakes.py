"""Deterministic parts for the seams: an engine, a policy, a reference. The product has none of its own.

Shared by tests that look at the trainer alone, and by those that need recorded rollouts without a server.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.types import (
    Finished,
    GradingItem,
    Group,
    LogpMode,
    Progress,
    Prompt,
    ReferenceReason,
    ReferenceVersion,
    Rollout,
    Sample,
    SampleRequest,
    Sampling,
    TokenIds,
    TokenValues,
    Verdict,
)
from owpo_megatron.verifiers.grading import Grading


class FakeEngine:
    """A RolloutEngine whose responses depend on (prompt id, seed) alone.

    Args:
        respond: (prompt, a generator of that sample's own) to the response's token ids.
    """

    def __init__(self, respond: Callable[[Prompt, random.Random], Sequence[int]], version: int = 0):
        self._respond = respond
        self.version = version
        self.calls: list[list[SampleRequest]] = []

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        self.calls.append(list(requests))
        rollouts = [self._draw(request, sampling) for request in requests]
        for index in range(len(rollouts) if finished is not None else 0):
            finished(index, rollouts[index : index + 1])
        return rollouts

    def weight_versions(self) -> list[int]:
        return [self.version]

    def close(self) -> None:
        pass

    def _draw(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        sampling = request.sampling or sampling
        rng = random.Random(f"{request.prompt.id}/{request.seed}")
        ids = TokenIds(self._respond(request.prompt, rng))[: sampling.max_tokens]
        logps = TokenValues([-3.0 * rng.random() for _ in ids])
        ended = bool(ids) and ids[-1] in sampling.stop_token_ids
        return Rollout(request.prompt, ids, logps, self.version, "stop" if ended else "length", request.seed)


def often_right(
    encode: Callable[[str], Sequence[int]], eos_id: int, symbols: str, chance: float = 0.5
) -> Callable[[Prompt, random.Random], list[int]]:
    """Responses that are the answer with this chance, else the answer with one symbol replaced, then the end."""

    def respond(prompt: Prompt, rng: random.Random) -> list[int]:
        text = list(prompt.answer)
        if rng.random() >= chance:
            place = rng.randrange(len(text))
            text[place] = rng.choice([symbol for symbol in symbols if symbol != text[place]])
        return [*encode("".join(text)), eos_id]

    return respond


class FakeVerifier:
    """Verdicts by the response's text: `verdicts[text]`, "wrong" for others."""

    def __init__(self, reasons: dict[str, str]):
        self._reasons = reasons
        self.closed = False

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        reasons = [self._reasons.get(item.response, "wrong") for item in items]
        return [Verdict(reason == "ok", reason) for reason in reasons]  # type: ignore[arg-type]

    def submit(self, items: Sequence[GradingItem]) -> Grading:
        grading = Grading(len(items))
        for index, verdict in enumerate(self.score(items)):
            grading.put(index, verdict)
        return grading

    def close(self) -> None:
        self.closed = True


class FakePolicy:
    """Log-probs by token id and version: logp = -(id + 1) / 10 - version / 100. An update raises the version.

    Notes what it was asked for in `events`.
    """

    logp_mode: LogpMode = "exact"

    def __init__(self, events: list[str] | None = None):
        self.version = 0
        self.events: list[str] = [] if events is None else events
        self.updates: list[list[Sample]] = []

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        self.events.append(f"policy.logprobs {len(samples)}")
        return fake_logprobs(samples, self.version)

    def logprobs_and_entropies(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The entropy of a token is a tenth of its id."""
        self.events.append(f"policy.logprobs and entropies {len(samples)}")
        return fake_logprobs(samples, self.version), [torch.tensor(one.response_ids) / 10 for one in samples]

    def logprobs_and_statistics(self, samples: Sequence[Sample], statistic: Any) -> Any:
        """The statistic of a token is a hundredth of its id, and less by a thousandth per update."""
        self.events.append(f"policy.logprobs and statistics {len(samples)}")
        statistics = [torch.tensor(one.response_ids) / 100 - self.version / 1000 for one in samples]
        entropies = [torch.tensor(one.response_ids) / 10 for one in samples]
        return fake_logprobs(samples, self.version), entropies, statistics

    def update(self, samples: Sequence[Sample], method: Any) -> dict[str, Any]:
        self.events.append(f"update {len(samples)}")
        self.updates.append(list(samples))
        self.version += 1
        tokens = float(sum(len(sample.response_ids) for sample in samples))
        return {"grad_norm": 1.0, "lr": 1e-3, "loss_sum": tokens, "loss_count": tokens, "tokens": tokens}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.tensor([float(self.version)])


class FakeReference:
    """The policy's version at the last swap."""

    logp_mode: LogpMode = "exact"

    def __init__(self, policy: FakePolicy):
        self._policy = policy
        self._of = policy.version
        self.version = ReferenceVersion(0, 0, "init", "")

    def swap(self, step: int, reason: ReferenceReason) -> None:
        self._policy.events.append(f"swap {step}")
        self._of = self._policy.version
        self.version = ReferenceVersion(self.version.ref_id + 1, step, reason, "")

    def is_policy(self) -> bool:
        return self._of == self._policy.version

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        self._policy.events.append(f"reference.logprobs {len(samples)}")
        return fake_logprobs(samples, self._of)


class FakeSync:
    """A WeightSync that keeps what arrived: (version, {name: tensor}) a push."""

    def __init__(self) -> None:
        self.pushed: list[tuple[int, dict[str, torch.Tensor]]] = []

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.pushed.append((version, dict(weights)))

    def close(self) -> None:
        pass


def alone() -> MainRank:
    """The MainRank of a world of one, without weights."""
    return MainRank(lambda value: value, lambda: [], FakeSync(), lambda: 0)


class NoLog:
    """A StepLog that keeps its calls."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.phases: list[str] = []
        self.sums: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self.phases.append(phase)
        yield

    def add(self, **values: Any) -> None:
        self.values.update(values)

    def add_update(self, sums: dict[str, Any]) -> None:
        self.sums.append(sums)


def fake_logprobs(samples: Sequence[Sample], version: int) -> list[torch.Tensor]:
    return [-(torch.tensor(sample.response_ids).float() + 1) / 10 - version / 100 for sample in samples]


def make_batches(config: Any, stages: Any, method: Any = None, policy: Any = None, reference: Any = None) -> Any:
    """A BatchBuilder of a whole configuration."""
    from owpo_megatron.methods import make_method
    from owpo_megatron.trainer.batches import BatchBuilder
    from owpo_megatron.trainer.rewards import RewardRules

    method = method or make_method(config.algorithm)
    rules = RewardRules.of(config.rollout, config.verifier)
    size, updates = config.rollout.group_size, config.optimizer.updates_per_step
    return BatchBuilder(config.algorithm, size, updates, rules, stages, method, policy, reference)


def make_collector(config: Any, *parts: Any, **more: Any) -> Any:
    """A RolloutCollector of a whole configuration; `parts` are those from `main` on."""
    from owpo_megatron.methods import make_method
    from owpo_megatron.trainer.ledger import PromptLedger
    from owpo_megatron.trainer.noise import RewardNoise
    from owpo_megatron.trainer.rewards import RewardRules
    from owpo_megatron.trainer.rollouts import Planning, RolloutCollector

    rules = RewardRules.of(config.rollout, config.verifier)
    noise = RewardNoise(config.seed, config.verifier.flip)
    method = more.pop("method", None) or make_method(config.algorithm)
    ledger = PromptLedger(method.forgetting, method.first_counts) if method.keeps_ledger else None
    planning = Planning(method, config.rollout.keeps_mixed_groups(method), *more.pop("memory", (ledger,)))
    steps = config.optimizer.steps
    return RolloutCollector(config.rollout, config.seed, steps, rules, noise, planning, *parts, **more)


def record_rollouts(config: Any, folder: Path, steps: int, chance: float = 0.5) -> list[int]:
    """Rollouts for `rollout.replay`: what a run with this config asks for in `steps` steps, drawn by a FakeEngine.

    The run's own collector, prompts, tokenizer and verifier decide what is asked for. Returns the prompts of each step.
    """
    from owpo_megatron.data import ShuffledStream, load_prompts, load_tokenizer
    from owpo_megatron.data.tasks import get_task
    from owpo_megatron.engine import rollouts_path, save_rollouts
    from owpo_megatron.verifiers import make_verifier

    tokenizer = load_tokenizer(config.model.path)
    prompts, _ = load_prompts(config.data, tokenizer)
    symbols = get_task(config.data.source.removeprefix("task:")).alphabet
    verifier = make_verifier(config.verifier, {prompt.domain for prompt in prompts})
    counts: list[int] = []

    def keep(step: int, seen: Sequence[Group], kept: Sequence[Group]) -> None:
        rollouts = [rollout for group in seen for rollout in group.rollouts]
        counts.append(len(seen))
        save_rollouts(rollouts_path(folder, step + 1), rollouts)

    collector = make_collector(
        config,
        alone(),
        FakeEngine(often_right(tokenizer.encode, tokenizer.eos_ids[0], symbols, chance)),
        verifier,
        ShuffledStream(prompts, config.seed),
        tokenizer.decode,
        tokenizer.eos_ids,
        keep,
    )
    for step in range(steps):
        collector.collect(step, NoLog())
    verifier.close()
    return counts
