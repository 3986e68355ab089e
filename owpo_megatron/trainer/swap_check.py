"""The hard swap, checked where it happens: the new reference computes what the policy computed, bit for bit, and the
old one computed at the end of its stage what it did at the beginning.

A few short sequences of random tokens are passed through the slots around each swap. That costs some milliseconds per
swap, and finds a slot that an optimizer step wrote to, a copy that went wrong, and a swap that was counted twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from owpo_megatron.errors import RunError
from owpo_megatron.types import Candidate, Policy, Reference, ReferenceReason, Sample, Swappable

SEQUENCES, TOKENS = 4, 8


class CheckedSwaps:
    """Implements Swappable over a reference, and checks each swap. Every method is collective.

    Args:
        swaps: the same object as `reference`: its other side.
        vocab_size: token ids of the sequences are below.
    """

    def __init__(self, swaps: Swappable, reference: Reference, policy: Policy, vocab_size: int):
        self._swaps, self._reference, self._policy = swaps, reference, policy
        draw = random.Random(0)
        ids = [tuple(draw.randrange(vocab_size) for _ in range(2 * TOKENS)) for _ in range(SEQUENCES)]
        self._probe = [Sample(one[:TOKENS], one[TOKENS:], 0.0, False, (0.0,) * TOKENS) for one in ids]
        self._since_swap: list[torch.Tensor] | None = None  # log-probs of the reference; None: no swap in this attempt
        self._of_candidate: list[torch.Tensor] | None = None

    @property
    def candidate(self) -> Candidate | None:
        return self._swaps.candidate

    def swap(self, step: int, reason: ReferenceReason) -> None:
        """Swap, and compare.

        Raises:
            RunError: the reference is not what it must be, before or after.
        """
        before = self._reference.version
        if self._since_swap is not None:
            self._compare(self._since_swap, self._reference.logprobs, f"reference {before.ref_id} has changed since")
        best = self._swaps.candidate if reason == "best_of_stage" else None
        source = step if best is None else best.step
        expected = self._policy.logprobs(self._probe) if source == step else self._of_candidate
        self._swaps.swap(step, reason)
        now = self._reference.version
        if (now.ref_id, now.source_step) != (before.ref_id + 1, source):
            raise RunError(
                f"after step {step} the reference is number {now.ref_id} of step {now.source_step}, instead of number "
                f"{before.ref_id + 1} of step {source}: this is a fault of the program"
            )
        self._since_swap = self._reference.logprobs(self._probe)
        if expected is not None:
            self._compare(expected, lambda probe: self._since_swap or [], f"reference {now.ref_id} differs from")
        self._of_candidate = None

    def restart_policy(self) -> None:
        self._swaps.restart_policy()

    def keep(self, candidate: Candidate) -> None:
        self._swaps.keep(candidate)
        self._of_candidate = self._policy.logprobs(self._probe)

    def restore_candidate(self, candidate: Candidate, state: Path) -> None:
        self._swaps.restore_candidate(candidate, state)

    def _compare(
        self, wanted: Sequence[torch.Tensor], logprobs: Callable[[Sequence[Sample]], list[torch.Tensor]], what: str
    ) -> None:
        found = logprobs(self._probe)
        if not all(one.equal(other) for one, other in zip(wanted, found, strict=True)):
            raise RunError(f"{what} the swap that made it: this is a fault of the program, and the run is ended")
