"""The endless, seeded, resumable stream of training prompts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt


class ShuffledStream:
    """Goes through all prompts again and again, each epoch in an order that depends on (seed, epoch) alone.

    A `PromptStream`. Its state is two small numbers, so a resumed run continues with exactly the prompts that the
    uninterrupted one would have taken.

    Raises:
        UserError: there are no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise UserError("data.source", "(empty)", "give a source with at least one problem")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._epoch = 0
        self._position = 0  # prompts of this epoch already taken
        self._order = self._permutation()

    def take(self, count: int) -> list[Prompt]:
        """The next prompts; crosses into the next epoch where one ends."""
        taken: list[Prompt] = []
        while len(taken) < count:
            if self._position == len(self._prompts):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation()
            end = min(self._position + count - len(taken), len(self._prompts))
            taken += [self._prompts[index] for index in self._order[self._position : end]]
            self._position = end
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "prompts": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            UserError: that stream had other prompts or another seed, so that continuing would repeat or skip some.
        """
        if state["seed"] != self._seed:
            raise UserError("seed", self._seed, f"the checkpoint was made with seed {state['seed']}; use that one")
        if state["prompts"] != self._fingerprint():
            raise UserError(
                "data.source",
                f"{len(self._prompts)} prompts",
                f"are not those of the checkpoint ({state['prompts']}); use the same source, limit and template",
            )
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"prompts/{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
        return f"{len(self._prompts)}:{digest.hexdigest()[:16]}"
