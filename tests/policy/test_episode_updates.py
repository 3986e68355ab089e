"""Episodes through the model itself: an episode of two turns is its two turns as two samples, on any ranks.

The second turn of an episode reads the first one and the observation; as a sample of its own it has both in its prompt.
Where tokens count alike and alone (divisor `tokens`, coupling `token`) loss, count and gradients must be equal, for
every such method: observations are read, and nothing else. Against dense float64 autograd, for every method:
tests/head/test_loss_mask.py. Not covered: CUDA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_pool import Ranks
from tiny import make_hf_model


def names() -> list[str]:
    """Methods for which two samples of a turn each are one sample of both."""
    from owpo_megatron.methods import catalogue, make_method

    made = {name: make_method(name) for name in sorted(catalogue())}
    return [name for name, method in made.items() if (method.coupling, method.chosen_divisor) == ("token", "tokens")]


def episodes() -> list[Any]:
    """Four episodes of two turns with an observation in between, of unequal lengths."""
    from tiny import random_samples

    found = []
    for one, first, shown in zip(random_samples(3, count=12)[::2], (1, 2, 3, 1), (2, 1, 1, 3), strict=False):
        length = len(one.response_ids)
        mask = tuple(not first <= place < first + shown for place in range(length + shown))
        ids = iter(one.response_ids)
        found.append(
            replace(
                one,
                response_ids=tuple(next(ids) if flag else 90 for flag in mask),
                behaviour_logp=with_gap(one.behaviour_logp, first, shown),
                old_logp=one.old_logp.new_tensor(with_gap(one.old_logp.tolist(), first, shown)),
                ref_logp=one.ref_logp.new_tensor(with_gap(one.ref_logp.tolist(), first, shown)),
                loss_mask=mask,
                masked=False,
            )
        )
    return found


def with_gap(values: Any, first: int, shown: int) -> tuple[float, ...]:
    return (*values[:first], *[1e6] * shown, *values[first:])


def as_two(episode: Any) -> list[Any]:
    """Each turn of an episode as a sample of its own, the second one with all before it as its prompt."""
    mask = episode.loss_mask
    end, start = mask.index(False), len(mask) - mask[::-1].index(False)

    def part(begin: int, stop: int) -> Any:
        return replace(
            episode,
            prompt_ids=(*episode.prompt_ids, *episode.response_ids[:begin]),
            response_ids=episode.response_ids[begin:stop],
            behaviour_logp=episode.behaviour_logp[begin:stop],
            old_logp=episode.old_logp[begin:stop],
            ref_logp=episode.ref_logp[begin:stop],
            loss_mask=None,
        )

    return [part(0, end), part(start, len(mask))]


def updates(model: Path, parallel: dict[str, Any], tokens: int, whole: bool) -> dict[str, Any]:
    from tiny import build_policy, make_config

    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.methods import make_method

    config = make_config(model, parallel=parallel, optimizer={"tokens_per_microbatch": tokens, "warmup_steps": 0})
    policy, found = build_policy(config, init_topology(config.parallel, config.seed)), {}
    samples = episodes()
    if not whole:
        samples = [turn for episode in samples for turn in as_two(episode)]
    logps = [logp.tolist() for logp in policy.logprobs(samples)]
    if whole:
        for one, values in zip(samples, logps, strict=True):
            observed = [logp for logp, own in zip(values, one.loss_mask, strict=True) if not own]
            assert not any(observed), "an observed token has no log-prob"
    flat = [logp for values in logps for logp in values if logp != 0]
    for name in names():
        policy.load_weights(model)
        policy._optimizer.reload_model_params()
        policy.restart_optimizer()
        sums = policy.update(samples, make_method(name))
        found[name] = {one: sums[one] for one in ("loss_sum", "loss_count", "tokens", "grad_norm", "head_rows")}
    return {"logps": flat, "sums": found}


@pytest.fixture(scope="module")
def expected(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    model = make_hf_model(tmp_path_factory.mktemp("episodes") / "model")
    return model, ranks.run(1, updates, model, {}, 1000, False)[0]


LAYOUTS: list[dict[str, Any]] = [{}, {"tp": 2, "sp": True}, {"dp": 2}, {"pp": 2}, {"cp": 2}]


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_an_episode_is_its_turns(ranks: Ranks, expected: tuple[Path, dict[str, Any]], parallel: dict[str, Any]) -> None:
    model, turns = expected
    world = 2 if parallel else 1
    found = ranks.run(world, updates, model, parallel, 24 if parallel else 1000, True)[0]
    assert found["logps"] == pytest.approx(turns["logps"], abs=2e-5)
    generated = sum(sum(one.loss_mask) for one in episodes())
    for name in names():
        ours, theirs = found["sums"][name], turns["sums"][name]
        assert ours["loss_count"] == theirs["loss_count"] == ours["tokens"] == ours["head_rows"] == generated, name
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6), name
        assert ours["grad_norm"] > 1e-3
