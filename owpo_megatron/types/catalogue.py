"""The catalogue of a step, which every rank has: everything but texts and tokens, which stay where they were drawn.

Shapes: N samples of a step, L tokens of one response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from owpo_megatron.types.experts import RoutedExperts
from owpo_megatron.types.rollouts import Group, Prompt, PromptRecord, Rollout, Verdict
from owpo_megatron.types.tokens import TokenIds, TokenValues

OF_ROLLOUT = ("policy_version", "finish_reason", "seed", "origin", "keeps_old", "versions", "episode")
"""Fields of a rollout that every rank gets. Tokens and values per token are `tokens_of`'s."""
OF_VERDICT = ("correct", "reason", "score", "parts")
"""Fields of a verdict that every rank gets; its seconds and detail are for the files of global rank 0."""


class Elsewhere(Sequence[Any]):
    """Numbers of tokens that this rank does not have: their count alone. Reading one is an error.

    Example:
        >>> len(Elsewhere(812)), bool(Elsewhere(0)), Elsewhere(3)
        (812, False, Elsewhere(3))
    """

    __slots__ = ("_length",)

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> int:
        """The count, where RoutedExperts have theirs."""
        return self._length

    def __getitem__(self, place: Any) -> Any:
        raise RuntimeError("tokens were read on a rank that does not have them (trainer/exchange.py brings them)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Elsewhere) and len(other) == self._length

    def __hash__(self) -> int:
        return hash(("elsewhere", self._length))

    def __reduce__(self) -> tuple[Any, ...]:
        return Elsewhere, (self._length,)

    def __repr__(self) -> str:
        return f"Elsewhere({self._length})"


def tokens_of(rollout: Rollout) -> dict[str, Any]:
    """Fields of a Sample that only the ranks that train on it get: token ids, and values per token, by name."""
    return {
        "prompt_ids": rollout.trained_ids or rollout.prompt.token_ids,
        "response_ids": rollout.response_ids,
        "behaviour_logp": rollout.behaviour_logp,
        "experts": rollout.experts,
    }


@dataclass(frozen=True)
class Catalogue:
    """Groups without their tokens, column by column: some dozen bytes per sample when it is pickled.

    A column has one value where all samples have the same, as in most columns of most runs.
    """

    sizes: list[int]  # siblings of each group
    past: list[PromptRecord | None]  # of each group
    prompts: list[Prompt]  # [N], one object per prompt
    rewards: list[float]
    lengths: list[int]  # tokens of the responses
    known: list[bool]  # whether there are log-probs by an engine
    trained: list[int | None]  # tokens of Rollout.trained_ids
    routed: list[int | None]  # tokens of Rollout.experts
    rollouts: Mapping[str, list[Any]]
    verdicts: Mapping[str, list[Any]]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Catalogue:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        # siblings share their prompt; the rollouts keep the objects alive, so that an id is one prompt's
        bare = {id(one.prompt): _without_tokens(one.prompt) for one in rollouts}
        return cls(
            sizes=[len(group.rollouts) for group in groups],
            past=_column([group.past for group in groups]),
            prompts=[bare[id(one.prompt)] for one in rollouts],
            rewards=_column([reward for group in groups for reward in group.rewards]),
            lengths=_column([len(one.response_ids) for one in rollouts]),
            known=_column([len(one.behaviour_logp) > 0 for one in rollouts]),
            trained=_column([None if one.trained_ids is None else len(one.trained_ids) for one in rollouts]),
            routed=_column([None if one.experts is None else one.experts.tokens for one in rollouts]),
            rollouts={name: _column([getattr(one, name) for one in rollouts]) for name in OF_ROLLOUT},
            verdicts={name: _column([getattr(one, name) for one in verdicts]) for name in OF_VERDICT},
        )

    def groups(self) -> list[Group]:
        """The groups, with `Elsewhere` in the place of tokens and without texts."""
        rollouts, verdicts = iter(self._rollouts()), iter(self._verdicts())
        rewards = iter(self._whole(self.rewards))
        past = self.past * len(self.sizes) if len(self.past) == 1 else self.past
        return [
            Group(_next(rollouts, size), _next(verdicts, size), _next(rewards, size), record)
            for size, record in zip(self.sizes, past, strict=True)
        ]

    def _rollouts(self) -> list[Rollout]:
        columns = zip(*(self._whole(self.rollouts[name]) for name in OF_ROLLOUT), strict=True)
        lengths, known_N = self._whole(self.lengths), self._whole(self.known)
        trained_N, routed_N = self._whole(self.trained), self._whole(self.routed)
        sizes = zip(self.prompts, lengths, known_N, trained_N, routed_N, strict=True)
        return [
            Rollout(
                prompt=prompt,
                response_ids=cast(TokenIds, Elsewhere(length)),
                behaviour_logp=cast(TokenValues, Elsewhere(length)) if known else (),
                trained_ids=None if trained is None else cast("tuple[int, ...]", Elsewhere(trained)),
                experts=None if routed is None else cast(RoutedExperts, Elsewhere(routed)),
                **dict(zip(OF_ROLLOUT, values, strict=True)),
            )
            for (prompt, length, known, trained, routed), values in zip(sizes, columns, strict=True)
        ]

    def _verdicts(self) -> list[Verdict]:
        columns = zip(*(self._whole(self.verdicts[name]) for name in OF_VERDICT), strict=True)
        return [Verdict(**dict(zip(OF_VERDICT, values, strict=True))) for values in columns]

    def _whole(self, column: list[Any]) -> list[Any]:
        return column * len(self.prompts) if len(column) == 1 else column


def _column(values: list[Any]) -> list[Any]:
    return values[:1] if all(type(one) is type(values[0]) and one == values[0] for one in values) else values


def _without_tokens(prompt: Prompt) -> Prompt:
    bare = cast("tuple[int, ...]", Elsewhere(len(prompt.token_ids)))
    return replace(prompt, token_ids=bare, text="", answer="", messages=())


def _next(values: Any, count: int) -> tuple[Any, ...]:
    return tuple(next(values) for _ in range(count))
