"""Collects a step's groups: the method's plan asks, responses are drawn and graded, the method keeps some groups."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from owpo_megatron.config import RolloutConfig
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Ask, Method, PlanView, Solutions, TokenStatistics
from owpo_megatron.run.metrics import StepLine
from owpo_megatron.trainer.drawing import Drawing, OpenGroup
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.ledger import PromptLedger, SamplePool
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.noise import RewardNoise
from owpo_megatron.trainer.partial import GroupsUnderWay, PartialDrawing
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.rollout_facts import RolloutFacts, own_rollouts
from owpo_megatron.trainer.supply import Supply, staleness
from owpo_megatron.types import (
    CuttingEngine,
    Group,
    Progress,
    Prompt,
    PromptRecord,
    PromptStream,
    Rollout,
    RolloutEngine,
    Sample,
    Sampling,
    StepLog,
    Verdict,
    Verifier,
    tokens_of,
)

MOST_ROUNDS = 1000  # of one step: a plan that never ends is a mistake


@dataclass(frozen=True)
class Planning:
    """Part of a run that decides what is drawn. The last three are of global rank 0, where the plan needs them."""

    method: Method  # whose plan it is
    dynamic: bool = False  # groups whose verdicts are all equal are dropped and replaced
    ledger: PromptLedger | None = None
    pool: SamplePool | None = None
    solutions: Solutions | None = None


@dataclass(frozen=True)
class Drawn:
    """A step's groups before they are recorded: all, those that are kept, and fields of the step's line."""

    seen: list[Group]
    kept: list[Group]
    facts: dict[str, Any]


class RolloutCollector:
    """Implements Rollouts: global rank 0 generates and grades, every rank gets the groups without their tokens.

    Args:
        config: the section `rollout`.
        seed: the run's seed.
        steps: steps of the run, for plans that follow a schedule.
        noise: rewards that are wrong on purpose (`verifier.flip`).
        planning: who asks for responses and keeps groups, and what it may look at.
        engine, verifier, stream: of rank 0; None elsewhere.
        decode: token ids to text.
        check_verdicts: raises where not one of a round's answers could be graded.
        date: what the prompts' template printed as today; goes into checkpoints.
        facts: metrics of the responses; None: those that every run has.
        record: called on rank 0 with (step, all groups that were generated, those of them that are kept).
        recover: brings lost engines back, with their weights; for steps that are drawn ahead (`rollout.max_staleness`).
        exchange: gets the tokens of the groups that are kept; None: this rank is alone.
    """

    def __init__(
        self,
        config: RolloutConfig,
        seed: int,
        steps: int,
        rules: RewardRules,
        noise: RewardNoise,
        planning: Planning,
        main: MainRank,
        engine: RolloutEngine | None,
        verifier: Verifier | None,
        stream: PromptStream | None,
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: tuple[int, ...],
        record: Callable[[int, Sequence[Group], Sequence[Group]], None],
        progress: Progress | None = None,
        date: datetime.date | None = None,
        check_verdicts: Callable[[Sequence[Verdict]], None] = lambda verdicts: None,
        facts: RolloutFacts | None = None,
        recover: Callable[[], None] | None = None,
        exchange: Exchange | None = None,
    ):
        self._config = config
        self._seed = seed
        self._steps = steps
        self._check_verdicts = check_verdicts
        self._facts = facts or RolloutFacts(rules, noise)
        self._rules = rules
        self._noise = noise
        self._plan, self._dynamic = planning.method, planning.dynamic
        self._ledger, self._pool, self._solutions = planning.ledger, planning.pool, planning.solutions
        self._main = main
        self._engine = engine
        self._verifier = verifier
        self._stream = stream
        self._decode = decode
        self._record = record
        self._progress = progress
        self._date = date
        self._exchange = exchange
        self._memory: dict[str, Any] = {}  # the plan's
        self._drawn = 0  # groups opened since the run began
        self._under_way = GroupsUnderWay(config, steps, self._stream_take, self._next_draw, self._past)
        self._waited_for = -1  # step
        self._sampling = Sampling(
            config.max_response_tokens,
            config.temperature,
            stop_token_ids=stop_token_ids,
            stop=tuple(config.stop),
            experts=config.routing_replay,
        )

        self._supply: Supply[Drawn] | None = None
        if config.max_staleness:
            recover = recover or (lambda: None)
            # what is cut in a step may be a step older in the next one
            ahead = config.max_staleness - 1 if config.surplus else config.max_staleness
            self._supply = Supply(self._draw_ahead, self._state, self._restore, recover, ahead, self._steps)

    def collect(self, step: int, log: StepLog) -> list[Group]:
        kept: list[Group] = []  # on global rank 0
        log.add(**self._main.run(lambda: self._collect_on_main(step, log, kept)))
        return kept if self._exchange is None else self._exchange.share(kept if self._engine is not None else None)

    def state_dict(self) -> dict[str, Any]:
        """Return where `collect` goes on; a step that is drawn ahead is drawn again."""
        return self._state() if self._supply is None else self._supply.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. A part that the checkpoint lacks begins empty."""
        if self._supply is None:
            self._restore(state)
        else:
            self._supply.load_state_dict(state)

    def _state(self) -> dict[str, Any]:
        assert self._stream is not None
        state = {"drawn": self._drawn, "stream": self._stream.state_dict()}
        kept = {"ledger": self._ledger, "pool": self._pool}
        state |= {name: part.state_dict() for name, part in kept.items() if part is not None}
        if self._memory:
            state["memory"] = self._memory
        state |= self._under_way.state_dict()
        return state if self._date is None else state | {"date": self._date.isoformat()}

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._stream is not None
        self._drawn = state["drawn"]
        self._stream.load_state_dict(state["stream"])
        self._memory = dict(state.get("memory", {}))
        if self._ledger is not None:
            self._ledger.load_state_dict(state.get("ledger", {}))
        if self._pool is not None:
            self._pool.load_state_dict(state.get("pool", {}))
        self._under_way.load_state_dict(state)

    def _collect_on_main(self, step: int, log: StepLog, kept: list[Group]) -> dict[str, Any]:
        if self._supply is None:
            drawn = self._draw(step, log)
        else:
            with log.timed("rollout"):
                self._waited_for = step
                drawn = self._supply.take(step)
            log.add(staleness=staleness(step, own_rollouts(drawn.seen), self._config.max_staleness))
        self._record(step, drawn.seen, drawn.kept)
        kept.extend(drawn.kept)
        return drawn.facts

    def _draw_ahead(self, step: int) -> Drawn:
        """Draw a step in the supply's thread, while another step's line is open."""
        line = StepLine(step)
        drawn = self._draw(step, line)
        seconds = line.as_dict()["seconds"]["total"]
        return replace(drawn, facts=drawn.facts | {"generation_seconds": seconds})

    def _working(self, step: int) -> Progress | None:
        """Progress of a step that the run waits for."""
        report = self._progress
        if report is None or self._supply is None:
            return report
        return lambda done, total: report(done, total) if self._waited_for >= step else None

    def _draw(self, step: int, log: StepLog) -> Drawn:
        assert self._engine is not None and self._verifier is not None
        judged = self._verifier, self._decode, self._check_verdicts, self._working(step)
        drawing = Drawing(self._seed, self._sampling, self._engine, *judged)
        partial = PartialDrawing(self._seed, self._sampling, self._cutting(), *judged) if self._config.surplus else None
        open_groups: list[OpenGroup] = []
        seen: list[Group] = []
        rounds = 0
        while asks := self._plan.plan(self._view(step, rounds, seen)):
            assert rounds < MOST_ROUNDS, f"{self._plan.name}.plan asks without end"
            if partial is None:
                drawing.draw(self._opened(asks, open_groups), open_groups, log)
            else:
                open_groups += self._under_way.first_complete(partial, len(asks), step, log)
            seen = [group.closed(self._noise) for group in open_groups]
            rounds += 1
        kept = list(self._plan.keep(self._view(step, rounds, seen)))
        if self._ledger is not None:
            for group in seen:
                self._ledger.visit(group.rollouts[0].prompt.id, self._rules.counted(group), step)
        if self._pool is not None:
            self._pool.add(seen)
        facts = self._facts.of(seen, kept) | {"rounds": rounds, "prompts_seen": self._drawn}
        if partial is not None:
            share = partial.continued / max(sum(rollout.generated_length for rollout in own_rollouts(seen)), 1)
            facts["partial"] = {"continued": share, "cut": partial.cut, "groups": len(self._under_way)}
        return Drawn(seen, kept, facts)

    def _cutting(self) -> CuttingEngine:
        if not hasattr(self._engine, "draw_until"):
            remedy = "the engine of this run cannot cut responses; set 0"
            raise UserError("rollout.surplus", self._config.surplus, remedy)
        return cast(CuttingEngine, self._engine)

    def _next_draw(self) -> int:
        self._drawn += 1
        return self._drawn - 1

    def _opened(self, asks: Sequence[Ask], groups: list[OpenGroup]) -> list[Ask]:
        """The asks with the numbers of their groups, of which new ones are opened."""
        numbered = []
        for ask in asks:
            if ask.group is None:
                groups.append(OpenGroup(self._next_draw(), self._past(ask.prompt)))
                ask = replace(ask, group=len(groups) - 1)
            numbered.append(ask)
        return numbered

    def _view(self, step: int, rounds: int, seen: list[Group]) -> PlanView:
        config = self._config
        return PlanView(
            step=step,
            steps=self._steps,
            round=rounds,
            max_rounds=config.max_rounds,
            prompts_per_step=config.prompts_per_step,
            group_size=config.group_size,
            oversampling=config.oversampling,
            temperature=config.temperature,
            max_tokens=config.max_response_tokens,
            groups=seen,
            dynamic=self._dynamic,
            take=self._under_way.take,
            is_mixed=self._rules.is_mixed,
            rewards=self._rules.counted,
            record=self._past,
            stored=self._stored,
            statistics=self._statistics,
            solutions=self._solutions,
            memory=self._memory,
            random=random.Random(f"plan/{self._seed}/{step}/{rounds}"),
        )

    def _stream_take(self, count: int) -> list[Prompt]:
        assert self._stream is not None
        return self._stream.take(count)

    def _past(self, prompt: Prompt) -> PromptRecord | None:
        return None if self._ledger is None else self._ledger.record(prompt.id)

    def _stored(self, prompt: Prompt) -> Sequence[Rollout]:
        return () if self._pool is None else self._pool.stored(prompt.id)

    def _statistics(self, rollouts: Sequence[Rollout]) -> list[TokenStatistics]:
        if self._supply is not None:
            remedy = f"{self._plan.name} looks at the policy's log-probs while it draws, which takes turns; set 0"
            raise UserError("rollout.max_staleness", self._config.max_staleness, remedy)
        samples = [
            Sample(**tokens, advantage=0.0, active=True, origin=one.origin, loss_mask=one.loss_mask)
            for one in rollouts
            for tokens in [tokens_of(one) | {"prompt_ids": one.prompt.token_ids, "experts": None}]
        ]
        if not samples:
            return []
        logps, entropies = self._main.statistics(samples)
        return [TokenStatistics(one.tolist(), other.tolist()) for one, other in zip(logps, entropies, strict=True)]
