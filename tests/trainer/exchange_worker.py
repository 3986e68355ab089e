"""Steps of methods whose samples are where they are used, or all of them everywhere; run by test_exchange.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

METHODS = ("owpo", "owpo_tis", "grpo", "gspo", "right_against_wrong", "canon", "hicra", "gigpo", "opd")
GROUPS, SIBLINGS = 6, 4


def groups(longest: int = 9, count: int = GROUPS) -> list[Any]:
    """Groups of right and wrong responses of unequal lengths: one of an expert, one that keeps its old log-probs under
    another prompt, one that failed, and an episode."""
    import random

    from owpo_megatron.types import Episode, Group, Prompt, Rollout, Span, TokenIds, TokenValues, Verdict

    draw, found = random.Random(3), []
    for number in range(count):
        prompt = Prompt(f"p/{number}", tuple(draw.randrange(96) for _ in range(2 + number % 3)), "text", "answer")
        rollouts, verdicts = [], []
        for sibling in range(SIBLINGS):
            length = draw.randrange(2, longest)
            ids = TokenIds(draw.randrange(96) for _ in range(length))
            logps = TokenValues(-4.5 + draw.random() for _ in range(length))
            one = Rollout(prompt, ids, logps, 3, draw.choice(("stop", "length")), draw.randrange(1 << 31))  # type: ignore[arg-type]
            if (number, sibling) == (0, 1):
                one = replace(one, behaviour_logp=(), origin="expert")
            if (number, sibling) == (1, 2):
                one = replace(one, trained_ids=(7, 8, 9), keeps_old=True)
            if (number, sibling) == (2, 0):
                spans = (Span(1, policy_version=3), Span(length - 1, generated=False, calls=1))
                one = replace(one, episode=Episode(spans))
            rollouts.append(one)
            right = (number + sibling) % 2 == 0
            verdicts.append(Verdict(right, "ok" if right else "wrong", seconds=0.25, detail="told"))
        if number == 3:
            verdicts[2] = Verdict(False, "timeout")
        found.append(Group(tuple(rollouts), tuple(verdicts), tuple(float(one.correct) for one in verdicts)))
    return found


def method_of(name: str) -> Any:
    from coupled_methods import RightAgainstWrong

    from owpo_megatron.methods import make_method

    if name == "right_against_wrong":
        return RightAgainstWrong()
    return make_method("owpo", tis_cap=2.0) if name == "owpo_tis" else make_method(name)


def steps(model: Path, parallel: dict[str, int], names: list[str], at_home: bool) -> list[dict[str, Any]]:
    """Two steps of each method; the sums of its updates, the weights after them, and what was recorded."""
    from fakes import NoLog
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference
    from owpo_megatron.trainer.batches import BatchBuilder
    from owpo_megatron.trainer.exchange import Exchange
    from owpo_megatron.trainer.rewards import RewardRules
    from owpo_megatron.trainer.schedule import StagePlan

    config = make_config(model, parallel=parallel, optimizer={"tokens_per_microbatch": 32, "warmup_steps": 0})
    policy, found = build_policy(config), []
    topology = policy.topology
    exchange = Exchange(topology) if at_home else None
    if exchange is not None:
        policy.fetch = exchange.fetch
    stages = StagePlan.of(config.reference, config.optimizer.steps)
    rules = RewardRules.of(config.rollout, config.verifier)
    for name in names:
        policy.load_weights(model)
        policy._optimizer.reload_model_params()
        policy.restart_optimizer()
        reference, recorded, sums = SlotReference(policy), [], []
        policy.slots.swap()
        policy.update(random_samples(1), make_method("grpo"))  # the reference is not the policy
        builder = BatchBuilder(
            config.algorithm, SIBLINGS, 2, rules, stages, method_of(name), policy, reference,
            record=lambda step, groups, samples, to=recorded: to.append(_told(groups, samples)),
            decode=lambda ids: "<think>" if ids[0] % 3 else "wait", exchange=exchange, recorded=2,
        )  # fmt: skip
        for step in range(2):
            drawn = groups()
            if exchange is not None:
                drawn = exchange.share(drawn if topology.is_main else None)
            for minibatch in builder.prepare(drawn, step, NoLog()):
                sums.append(policy.update(minibatch, method_of(name)))
        found.append(
            {
                "method": name, "sums": sums, "weights": policy.weights_digest(),
                "recorded": recorded if topology.is_main else [],
            }
        )  # fmt: skip
    return found


def _told(groups: Any, samples: Any) -> Any:
    """Return what is recorded of a step, with the values per token that it asks for."""
    keys = [(rollout.prompt.id, rollout.seed) for group in groups for rollout in group.rollouts]
    values = [
        [None if one is None else one.tolist() for one in (sample.old_logp, sample.ref_logp)]
        for sample in samples
        if sample.group < 2
    ]
    return keys, values, [(sample.active, sample.masked, len(sample.response_ids)) for sample in samples]


def asked_of_main(model: Path, parallel: dict[str, int]) -> dict[str, bool]:
    """Ask for what goes by way of global rank 0: log-probs and entropies for a plan, and a teacher behind a server."""
    import torch
    from fakes import FakeSync
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.trainer.batches import _bare
    from owpo_megatron.trainer.exchange import Exchange
    from owpo_megatron.trainer.main_rank import MainRank
    from owpo_megatron.trainer.teachers import EngineTeacher

    policy = build_policy(make_config(model, parallel=parallel))
    topology, exchange = policy.topology, Exchange(policy.topology)
    whole = policy.logprobs_and_entropies(random_samples(5))
    policy.fetch = exchange.fetch
    sync = FakeSync() if topology.is_main else None
    main = MainRank(topology.broadcast, lambda: [], sync, lambda error: 0, policy, exchange=exchange)  # type: ignore[arg-type]

    def work() -> bool:
        asked = main.statistics(random_samples(5))
        return all(
            one.equal(other)
            for ours, theirs in zip(asked, whole, strict=True)
            for one, other in zip(ours, theirs, strict=True)
        )

    found = {"a plan": main.run(work)}

    def score(texts: Any) -> list[list[float]]:
        return [[-sum(prompt) - token / 100 for token in ids] for prompt, ids in texts]

    teacher = EngineTeacher(main, score if topology.is_main else None, "a model", exchange)
    whole_samples = _bare(groups())
    bare = _bare(exchange.share(groups() if topology.is_main else None))
    bare = [replace(one, home=home) for one, home in zip(bare, policy.homes(bare), strict=True)]
    expected = [torch.tensor(one) for one in score([(one.prompt_ids, one.response_ids) for one in whole_samples])]
    found["a teacher"] = all(
        logps.equal(wanted) if sample.home == topology.dp_rank else not len(logps)
        for sample, logps, wanted in zip(bare, teacher.logprobs(bare), expected, strict=True)
    )
    everywhere = [replace(one, home=None) for one in bare]
    found["a teacher for all"] = all(map(torch.equal, teacher.logprobs(everywhere), expected))
    return found


@dataclass
class Received:
    """Bytes that a rank gets, by what for."""

    catalogue: int = 0
    rows: int = 0
    values: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Received]:
    """Count what the collectives under Topology's methods bring to this rank, and what a ring sends for sums."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from owpo_megatron.mcore.topology import Topology

    received, kind = Received(), [""]

    def counted(function: Any, which: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if kind[0] and (group is None or dist.get_world_size(group) > 1):
                tensor = args[which]
                size = tensor.numel() * tensor.element_size()
                setattr(received, kind[0], getattr(received, kind[0]) + size)
            return function(*args, **kwargs)

        return call

    def under(name: str, label: str) -> Any:
        method = getattr(Topology, name)

        def call(self: Any, *args: Any) -> Any:
            kind[0], before = label, kind[0]
            try:
                return method(self, *args)
            finally:
                kind[0] = before

        return mock.patch.object(Topology, name, call)

    with contextlib.ExitStack() as stack:
        for name in ("broadcast", "scatter"):
            stack.enter_context(mock.patch.object(distributed_c10d, name, counted(getattr(dist, name), 0)))
        for name in ("all_reduce", "all_to_all_single"):
            stack.enter_context(mock.patch.object(dist, name, counted(getattr(dist, name), 0)))
        stack.enter_context(under("broadcast", "catalogue"))
        stack.enter_context(under("deal", "rows"))
        for name in ("sum_over_data_and_stages", "sum_over_context_and_stages", "swap_over_data"):
            stack.enter_context(under(name, "values"))
        yield received


def bytes_of_a_step(model: Path, parallel: dict[str, int], at_home: bool, longest: int, count: int) -> dict[str, Any]:
    """Bytes that this rank receives in a step of OWPO whose reference differs, and the step's tokens and samples."""
    from fakes import NoLog
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference
    from owpo_megatron.trainer.batches import BatchBuilder
    from owpo_megatron.trainer.exchange import Exchange
    from owpo_megatron.trainer.rewards import RewardRules
    from owpo_megatron.trainer.schedule import StagePlan

    rollout = {"max_response_tokens": longest}
    config = make_config(model, parallel=parallel, rollout=rollout, optimizer={"tokens_per_microbatch": 1024})
    policy = build_policy(config)
    topology, reference = policy.topology, SlotReference(policy)
    policy.slots.swap()
    policy.update(random_samples(1), make_method("grpo"))
    exchange = Exchange(topology) if at_home else None
    if exchange is not None:
        policy.fetch = exchange.fetch
    stages = StagePlan.of(config.reference, config.optimizer.steps)
    rules = RewardRules.of(config.rollout, config.verifier)
    builder = BatchBuilder(
        config.algorithm, SIBLINGS, 2, rules, stages, make_method("owpo"), policy, reference, exchange=exchange
    )
    drawn = groups(longest, count)
    tokens = sum(len(rollout.response_ids) for group in drawn for rollout in group.rollouts)
    with counting() as received:
        if exchange is None:
            drawn = topology.broadcast(drawn if topology.is_main else None)
        else:
            drawn = exchange.share(drawn if topology.is_main else None)
        minibatches = list(builder.prepare(drawn, 0, NoLog()))
    assert sum(len(one) for one in minibatches) == SIBLINGS * count
    return vars(received) | {"tokens": tokens, "samples": SIBLINGS * count}
