"""Swaps that go wrong in every way that the check knows, and those that go right; real slots are in tests/policy."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import FakePolicy, FakeReference

from owpo_megatron.errors import RunError
from owpo_megatron.trainer.swap_check import CheckedSwaps
from owpo_megatron.types import Candidate, ReferenceReason


class Reference(FakeReference):
    """A reference with a candidate, as SlotReference is one."""

    candidate: Candidate | None = None

    def keep(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.kept = self._policy.version

    def swap(self, step: int, reason: ReferenceReason) -> None:
        super().swap(step, reason)
        if reason == "best_of_stage":
            assert self.candidate is not None
            self._of = self.kept
            self.version = dataclasses.replace(self.version, source_step=self.candidate.step)
            self.candidate = None


def make() -> tuple[FakePolicy, Reference, CheckedSwaps]:
    policy = FakePolicy()
    reference = Reference(policy)
    return policy, reference, CheckedSwaps(reference, reference, policy, vocab_size=50)  # type: ignore[arg-type]


def test_right_swaps_are_let_through() -> None:
    policy, reference, swaps = make()
    for step in (2, 4):
        policy.version += 1
        swaps.swap(step, "interval")
    assert reference.version.ref_id == 2
    policy.version += 1
    swaps.keep(Candidate(5, 0.5))
    policy.version += 1
    swaps.swap(6, "best_of_stage")
    assert reference.version.source_step == 5
    policy.version += 1
    swaps.swap(8, "interval")


def test_a_reference_that_changes_within_its_stage() -> None:
    policy, reference, swaps = make()
    swaps.swap(2, "interval")
    policy.version += 1
    reference._of += 1  # an optimizer step wrote to its slot
    with pytest.raises(RunError, match="reference 1 has changed since the swap that made it"):
        swaps.swap(4, "interval")


def test_a_swap_that_takes_other_weights() -> None:
    policy, reference, swaps = make()
    policy.version = 3
    plain = reference.swap

    def late(step: int, reason: ReferenceReason) -> None:
        plain(step, reason)
        reference._of = 2

    reference.swap = late  # type: ignore[method-assign]
    with pytest.raises(RunError, match="reference 1 differs from the swap that made it"):
        swaps.swap(2, "interval")


@pytest.mark.parametrize(("ref_id", "source"), [(2, 2), (0, 2), (1, 1)])
def test_a_swap_that_is_counted_wrongly(ref_id: int, source: int) -> None:
    policy, reference, swaps = make()
    plain = reference.swap

    def miscounted(step: int, reason: ReferenceReason) -> None:
        plain(step, reason)
        reference.version = dataclasses.replace(reference.version, ref_id=ref_id, source_step=source)

    reference.swap = miscounted  # type: ignore[method-assign]
    with pytest.raises(RunError, match=f"number {ref_id} of step {source}, instead of number 1 of step 2"):
        swaps.swap(2, "interval")
