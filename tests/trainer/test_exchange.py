"""Samples live where they are used: every rank has a catalogue, and the tokens of what it passes through the model.

The same updates as where every rank has everything, bit by bit: dp, and dp with tp, pp and cp, for methods of every
coupling and need. Not covered: CUDA; whole runs on several ranks are tests/e2e's.
"""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from exchange_worker import METHODS, asked_of_main, bytes_of_a_step, groups, steps
from rank_pool import Ranks
from test_step_view import RIGHT, WRONG, builder, group
from tiny import make_hf_model

from owpo_megatron.methods import Dapo, StepView, catalogue
from owpo_megatron.policy.policy import choosing_themselves
from owpo_megatron.trainer.batches import _bare, check_experts
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.types import Catalogue, Elsewhere, Group, Prompt, Rollout, RoutedExperts, Sample, Verdict, tokens_of
from owpo_megatron.types.catalogue import OF_ROLLOUT, OF_VERDICT


def test_a_catalogue_has_everything_but_tokens_and_texts() -> None:
    drawn = groups()
    listed = pickle.loads(pickle.dumps(Catalogue.of(drawn))).groups()
    for found, whole in zip(listed, drawn, strict=True):
        assert found.rewards == whole.rewards and found.past == whole.past
        assert [replace(one, seconds=0.0, detail="") for one in whole.verdicts] == list(found.verdicts)
        for ours, theirs in zip(found.rollouts, whole.rollouts, strict=True):
            assert all(getattr(ours, name) == getattr(theirs, name) for name in OF_ROLLOUT)
            for name in ("response_ids", "behaviour_logp"):
                assert len(getattr(ours, name)) == len(getattr(theirs, name))
            assert len(ours.trained_ids or ()) == len(theirs.trained_ids or ())
            assert (ours.prompt.id, ours.prompt.domain) == (theirs.prompt.id, theirs.prompt.domain)
            assert len(ours.prompt.token_ids) == len(theirs.prompt.token_ids) and ours.prompt.text == ""
            assert ours.loss_mask == theirs.loss_mask and ours.generated_length == theirs.generated_length


def test_every_field_is_in_the_catalogue_or_in_the_rows() -> None:
    """A field that is added to a rollout or a verdict is lost on other ranks unless it is named here or there."""
    kept_by_main = {"prompt", "verdict"}  # the group has the verdict
    rows = {"response_ids", "behaviour_logp", "trained_ids", "experts"}
    assert {one.name for one in fields(Rollout)} == {*OF_ROLLOUT, *rows, *kept_by_main}
    assert {one.name for one in fields(Verdict)} == {*OF_VERDICT, "seconds", "detail"}
    assert set(tokens_of(groups()[0].rollouts[0])) <= {one.name for one in fields(Sample)}


def test_a_sample_takes_some_dozen_bytes() -> None:
    drawn = groups(longest=2000, count=64)
    plain = [
        Group(
            tuple(replace(one, episode=None, trained_ids=None) for one in found.rollouts), found.verdicts, found.rewards
        )
        for found in drawn
    ]
    size = len(pickle.dumps(Catalogue.of(plain))) / 256
    assert size < 64, size


def test_nobody_reads_what_is_elsewhere() -> None:
    numbers = Elsewhere(3)
    for read in (list, tuple, lambda one: one[0], lambda one: 5 in one):
        with pytest.raises(RuntimeError, match="on a rank that does not have them"):
            read(numbers)
    assert len(numbers) == 3 and not Elsewhere(0) and numbers == Elsewhere(3) != Elsewhere(4)


class Peeking(Dapo):
    name = "peeking"

    def advantages(self, step: StepView) -> list[float]:
        return [sum(one) for one in step.behaviour_N]


def test_tokens_in_advantages_are_declared() -> None:
    """Refused on one rank, too: a method that works there works on many."""
    with pytest.raises(TypeError, match="peeking.advantages reads step.behaviour_N: declare needs_tokens = True"):
        builder(Peeking()).samples([group("a", RIGHT, WRONG, WRONG)], 0)


def test_an_empty_step_is_shared() -> None:
    assert Catalogue.of([]).groups() == []
    rollout = Rollout(Prompt("a", (1,), "", ""), (2,), (-0.5,), 0, "stop", 1)
    (alone,) = Catalogue.of([Group((rollout,), (RIGHT,), (1.0,))]).groups()
    assert alone.rollouts[0].prompt.id == "a"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("exchange") / "model")


def compared(ranks: Ranks, model: Path, parallel: dict[str, int], names: tuple[str, ...], count: int) -> None:
    everywhere = ranks.run(count, steps, model, parallel, list(names), False)
    at_home = ranks.run(count, steps, model, parallel, list(names), True)
    for rank, (found, expected) in enumerate(zip(at_home, everywhere, strict=True)):
        for ours, theirs in zip(found, expected, strict=True):
            for name in theirs:
                assert ours[name] == theirs[name], (rank, ours["method"], name)
    (one, *_), (other, *_) = at_home[0][0]["sums"], at_home[0][1]["sums"]
    assert one != other, "methods differ"


@pytest.mark.ranks
def test_every_method_on_two_data_parallel_ranks(ranks: Ranks, model: Path) -> None:
    """Except spo_chain, whose advantages need the groups of its own plan; `gigpo` reads tokens everywhere, too."""
    known = {name for name, method in catalogue().items() if method.__module__.startswith("owpo_megatron.")}
    names = (*METHODS, *sorted(known - {*METHODS, "spo_chain"}))
    assert known - {*names} == {"spo_chain"} and len(names) > 70
    compared(ranks, model, {"dp": 2}, names, 2)


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [{"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_homes_of_two_ranks(ranks: Ranks, model: Path, parallel: dict[str, int]) -> None:
    compared(ranks, model, parallel, ("owpo", "right_against_wrong"), 4)


@pytest.mark.matrix
@pytest.mark.ranks
@pytest.mark.parametrize(
    "parallel", [{"dp": 4}, {"tp": 2}, {"pp": 2, "vpp": 2, "dp": 2}, {"dp": 2, "tp": 2, "pp": 2}], ids=str
)
def test_every_need_in_more_layouts(ranks: Ranks, model: Path, parallel: dict[str, int]) -> None:
    count = 1
    for axis, size in parallel.items():
        count *= 1 if axis == "vpp" else size
    compared(ranks, model, parallel, METHODS, count)


@pytest.mark.ranks
def test_what_main_is_asked_for(ranks: Ranks, model: Path) -> None:
    for found in ranks.run(2, asked_of_main, model, {"dp": 2}):
        assert found and all(found.values()), found


@pytest.mark.ranks
def test_a_rank_receives_its_share(ranks: Ranks, model: Path) -> None:
    """256 samples, four ranks. Figures for a reader: pytest -s."""
    longest, count = 120, 64
    before = ranks.run(4, bytes_of_a_step, model, {"dp": 4}, False, longest, count)
    after = ranks.run(4, bytes_of_a_step, model, {"dp": 4}, True, longest, count)
    print(before, after, sep="\n")
    for ours, theirs in zip(after[1:], before[1:], strict=True):
        assert ours["catalogue"] < 64 * ours["samples"]
        received = [one["rows"] + one["values"] + one["catalogue"] for one in (ours, theirs)]
        assert received[0] < 0.5 * received[1]


class Alone:
    """The ranks of a world of one."""

    is_main, dp_rank, dp_size = True, 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def deal(self, parts: Any) -> Any:
        return parts[0]


def test_experts_go_to_passes_that_replay_them() -> None:
    """A reference chooses experts for itself: its pass fetches ids and log-probs alone, the policy's the rest."""
    experts = RoutedExperts.of(numpy.zeros((3, 2, 2), dtype=int), 8)
    rollout = Rollout(Prompt("a", (1, 2), "", ""), (3, 4), (-0.5, -0.6), 0, "stop", 1, experts=experts)
    exchange = Exchange(Alone())  # type: ignore[arg-type]
    listed = exchange.share([Group((rollout,), (RIGHT,), (1.0,))])
    check_experts(listed)
    bare = _bare(listed)
    (of_reference,) = exchange.fetch(choosing_themselves(bare), [0])
    assert of_reference.response_ids == (3, 4) and of_reference.experts is None
    assert exchange.here(bare[0]).experts == Elsewhere(3), "nothing has brought them"
    (of_policy,) = exchange.fetch(bare, [0])
    assert of_policy.experts == experts and of_policy.prompt_ids == (1, 2)
