"""A run under a virtual clock: the product's packing, dealing and supply, with seconds from FLOPs and bytes.

    virtual time     0        g0       g0+t0              ...
    engines          draw 0 | draw 1 (bound 1) ...  paused while weights are pushed
    trainer                  | step 0: log-probs, updates, push | step 1 ...

`Supply` decides which steps may be drawn, in its own thread; when they are drawn is worked out from what it let through
and from the pushes. Nothing waits: seconds are numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel
from owpo_megatron.methods import make_method
from owpo_megatron.plan.lengths import Draw
from owpo_megatron.plan.machine import Machine
from owpo_megatron.plan.trainer_cost import Pass, TrainerCost
from owpo_megatron.plan.virtual_engines import DecodingCost, Generated, generate, generate_on
from owpo_megatron.trainer.supply import Supply, staleness
from owpo_megatron.types import Prompt, Rollout

SETTLING = 2  # steps at the start that the means leave out: nothing was drawn ahead of them
STREAM = 4  # steps in a row from which a stream's pace is taken
_PARTS = 1000  # in which a step's tokens are split among the weights that sampled them


@dataclass(frozen=True)
class Cluster:
    """GPUs of the trainer and of the engines; shared: the same ones, in turns."""

    trainer_gpus: int
    engine_gpus: int
    shared: bool

    @property
    def gpus(self) -> int:
        return self.trainer_gpus if self.shared else self.trainer_gpus + self.engine_gpus


@dataclass(frozen=True)
class Simulated:
    """Means over the steps after the first ones."""

    gpus: int
    trainer_gpus: int
    engine_gpus: int
    shared: bool
    max_staleness: int
    dp: int
    seconds: dict[str, float]  # of a step: total, and by phase; `rollout` is what the trainer waited
    generation_seconds: float  # of a step's responses, whether the trainer waited or not
    idle: dict[str, float]  # share of GPU seconds without work: trainer, engines, all
    staleness: dict[str, float]  # per token: mean, max
    bytes_per_gpu: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Step(NamedTuple):
    phases: dict[str, float]
    total: float  # seconds
    busy: float  # of the trainer's ranks, mean
    generated: Generated
    ages: dict[str, float]
    sent: dict[str, float]


class Clock:
    """Virtual times of drawing: one step after the other, from when it is allowed, paused by pushes."""

    def __init__(self, bound: int):
        self._bound = bound
        self._allowed: dict[int, float] = {}
        self._free = 0.0  # when the engines have drawn what came before
        self._pushes: list[tuple[float, float]] = []  # (begin, seconds); push k brings version k + 1

    def take(self, step: int, now: float) -> None:
        """The trainer asks for a step: those up to the bound may be drawn from now on."""
        for one in range(step + self._bound + 1):
            self._allowed.setdefault(one, now)

    def push(self, now: float, seconds: float) -> None:
        self._pushes.append((now, seconds))

    def drawn(self, step: int, seconds: float) -> tuple[float, float, tuple[tuple[int, int], ...]]:
        """(begin, end, (version, how many of _PARTS tokens it sampled)) of a step that takes so long undisturbed."""
        begin = max(self._free, self._allowed[step])
        version = sum(at + length <= begin for at, length in self._pushes)
        spans, at, left = [], begin, seconds
        for push, length in self._pushes[version:]:
            if push >= at + left:
                break
            spans.append((max(push - at, 0.0), version))
            left, at, version = left - max(push - at, 0.0), push + length, version + 1
        spans.append((left, version))
        self._free = at + left
        counts = [(number, round(_PARTS * length / seconds)) for length, number in spans]
        return begin, self._free, tuple((number, count) for number, count in counts if count)


def simulate(
    config: Config,
    model: HFModel,
    machine: Machine,
    cluster: Cluster,
    draw_lengths: Draw,
    bound: int,
    steps: int = 6,
    drawn: float = 1.0,
    old_pass: bool | None = None,
    streams: bool = False,
) -> Simulated:
    """Simulate steps of a run.

    Args:
        bound: `rollout.max_staleness`.
        drawn: groups generated for one kept.
        old_pass: whether the trainer computes the old policy's log-probs; None: as the method needs them.
        streams: engines do not wait for a step's longest responses, which go on beside the next step's.

    Raises:
        UserError: the GPUs cannot hold the layout.
        RunError: a token is older than the bound.
    """
    assert steps > SETTLING and not (bound and cluster.shared), "shared engines and trainer take turns"
    trainer = TrainerCost(config, model, machine, cluster.trainer_gpus)
    decoding, method = DecodingCost.of(config, model, machine), make_method(config.algorithm)
    engines = max(1, cluster.engine_gpus // config.engine.tp)
    count = config.rollout.prompts_per_step * config.rollout.group_size
    if old_pass is None:
        old_pass = bool(bound) or (method.needs_old and config.optimizer.updates_per_step > 1)
    reference = 1.0 if method.needs_reference != "none" else 0.0
    assert bound or not streams, "engines that take turns with the trainer end a step"

    def drawn_in(step: int) -> list[tuple[int, int]]:
        rng = random.Random(f"{config.seed} {step}")
        return [draw_lengths(rng) for _ in range(round(count * drawn))]

    def draw(step: int) -> tuple[list[tuple[int, int]], Generated]:
        lengths = drawn_in(step)
        if streams:
            several = [lengths, *(drawn_in(step + more) for more in range(1, STREAM))]
            return lengths, generate_on(several, engines, decoding, config.engine.concurrency)
        return lengths, generate(lengths, engines, decoding, config.engine.concurrency)

    supply: Supply[tuple[list[tuple[int, int]], Generated]] = Supply(
        draw, state=dict, restore=_nothing, recover=lambda: None, bound=bound, steps=steps
    )
    clock, now = Clock(bound), 0.0
    rows: list[_Step] = []
    for step in range(steps):
        start = now
        clock.take(step, now)
        lengths, generated = supply.take(step)
        _, end, spans = clock.drawn(step, generated.seconds)
        now = max(now, end)
        ages = staleness(step, [_rollout(spans)], bound)
        phases = {"rollout": now - start}
        tokens = [prompt + response for prompt, response in lengths[:count]]
        passes = {
            "old_logp": trainer.forward(tokens, machine.logprobs) if old_pass else Pass(),
            "reference": trainer.forward(tokens, machine.logprobs * reference) if reference else Pass(),
            "update": _updates(trainer, tokens, config.optimizer.updates_per_step),
        }
        phases |= {name: one.seconds for name, one in passes.items()}
        phases |= {"sync": trainer.push_seconds}
        now += sum(one.seconds for one in passes.values())
        clock.push(now, trainer.push_seconds)
        now += trainer.push_seconds
        busy = sum(one.busy for one in passes.values())
        sent = trainer.bytes_by_link(tokens, bool(old_pass) + reference)
        rows.append(_Step(phases, now - start, busy, generated, ages, sent))
    return _means(rows[SETTLING:], trainer, cluster, bound)


def _updates(trainer: TrainerCost, tokens: list[int], updates: int) -> Pass:
    each = len(tokens) // updates
    total = Pass()
    for number in range(updates):
        total = total + trainer.update(tokens[number * each : (number + 1) * each])
    return total


def _means(rows: list[_Step], trainer: TrainerCost, cluster: Cluster, bound: int) -> Simulated:
    def mean(of: Callable[[_Step], float]) -> float:
        return sum(of(row) for row in rows) / len(rows)

    total = mean(lambda row: row.total)
    training, generating = mean(lambda row: row.busy), mean(lambda row: row.generated.busy)
    idle = {"trainer": 1 - training / total, "engines": 1 - generating / total}
    trainer_share = 1.0 if cluster.shared else cluster.trainer_gpus / cluster.gpus
    engine_share = 1.0 if cluster.shared else cluster.engine_gpus / cluster.gpus
    idle["all"] = 1 - (training * trainer_share + generating * engine_share) / total
    return Simulated(
        cluster.gpus,
        cluster.trainer_gpus,
        cluster.engine_gpus,
        cluster.shared,
        bound,
        trainer.dp,
        {"total": total} | {name: sum(row.phases[name] for row in rows) / len(rows) for name in rows[0].phases},
        mean(lambda row: row.generated.seconds),
        idle,
        {"mean": mean(lambda row: row.ages["mean"]), "max": max(row.ages["max"] for row in rows)},
        {name: sum(row.sent[name] for row in rows) / len(rows) for name in rows[0].sent},
    )


def _rollout(spans: tuple[tuple[int, int], ...]) -> Rollout:
    """A response whose tokens stand for those of a step."""
    total = sum(count for _, count in spans)
    prompt = Prompt("simulated", (0,), "", "")
    versions = spans if len(spans) > 1 else ()
    return Rollout(prompt, (0,) * total, (0.0,) * total, spans[-1][0], "stop", 0, versions=versions)


def _nothing(state: dict[str, Any]) -> None:
    """A simulation is never taken up again."""
