"""The endless, seeded, resumable stream of training prompts, from one source or several."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from owpo_megatron.config import DataConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt


class ShuffledStream:
    """Goes through all prompts again and again, each epoch in an order that depends on (seed, name, epoch) alone.

    A `PromptStream`. Its state is two small numbers, so a resumed run continues with exactly the prompts that the
    uninterrupted one would have taken.

    Args:
        name: of one of several sources, so that equal ones are not in step.

    Raises:
        UserError: there are no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, name: str = ""):
        if not prompts:
            raise UserError("data.source", "(empty)", "give a source with at least one problem")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._name = name
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
                f"are not those of the checkpoint ({state['prompts']}); use the same source, limit, template and date",
            )
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._permutation()

    def __len__(self) -> int:
        return len(self._prompts)

    def _permutation(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"prompts{self._name}/{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
        return f"{len(self._prompts)}:{digest.hexdigest()[:16]}"


class MixedStream:
    """Prompts of several sources by their weights, each source shuffled by itself. A `PromptStream`.

    After any number of prompts, each source has contributed its share to within one: the next prompt comes from the
    source that is furthest behind its share.

    Args:
        streams: the stream of each source, with its weight.
    """

    def __init__(self, streams: Sequence[tuple[ShuffledStream, float]]):
        total = sum(weight for _, weight in streams)
        self._streams = [stream for stream, _ in streams]
        self._shares = [weight / total for _, weight in streams]
        self._taken = [0] * len(streams)

    def take(self, count: int) -> list[Prompt]:
        """The next prompts."""
        taken: list[Prompt] = []
        for _ in range(count):
            drawn = sum(self._taken) + 1
            behind = [share * drawn - had for share, had in zip(self._shares, self._taken, strict=True)]
            source = behind.index(max(behind))
            self._taken[source] += 1
            taken += self._streams[source].take(1)
        return taken

    def __len__(self) -> int:
        return sum(map(len, self._streams))

    def state_dict(self) -> dict[str, Any]:
        streams = [stream.state_dict() for stream in self._streams]
        return {"taken": self._taken, "shares": self._shares, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            UserError: the sources or their weights were others.
        """
        shares = state.get("shares")
        if shares != self._shares:
            remedy = f"the checkpoint was made with shares {shares}; use the same sources and weights"
            raise UserError("data.sources", self._shares, remedy)
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(own)
        self._taken = list(state["taken"])


def make_stream(config: DataConfig, prompts: Sequence[Prompt], seed: int) -> ShuffledStream | MixedStream:
    """The stream of a run's training prompts: all of them alike, or by the weights of their sources.

    Raises:
        UserError: a source has no prompt left.
    """
    weights = [part.weight for part in config.parts]
    if len(weights) == 1 or weights[0] is None:
        return ShuffledStream(prompts, seed)
    streams = []
    for number, (part, weight) in enumerate(zip(config.parts, weights, strict=True)):
        own = [prompt for prompt in prompts if prompt.source == number]
        if not own:
            raise UserError(f"data.sources[{number}]", part.source, "no prompt of it is left; leave it out")
        assert weight is not None, "either all sources have a weight or none"
        streams.append((ShuffledStream(own, seed, f"/{number}"), weight))
    return MixedStream(streams)
