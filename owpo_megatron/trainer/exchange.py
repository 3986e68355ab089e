"""Rows of a step: tokens and values per token, from global rank 0, which drew them, to the ranks that train on them.

rank 0                         every rank                              the ranks of data-parallel rank d
  draws groups, keeps rows  ->   catalogue (types/catalogue.py)
                                 advantages, packs: without a message
  deals rows                ->                                           rows of the samples in d's packs, once per step

Row n is that of the step's sample n. All ranks plan alike, so that each knows what every other one lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from owpo_megatron.types import Catalogue, Elsewhere, Group, Ranks, Sample, TokenIds, tokens_of

Row = Mapping[str, Any]
"""Fields of a Sample by name."""
READ = ("prompt_ids", "response_ids", "behaviour_logp")
FIELDS = (*READ, "experts")
"""Fields of a row; a sample that does not need one has another value than Elsewhere there."""


class Homes(Ranks, Protocol):
    """All trainer ranks, in homes: the ranks of one data-parallel rank, which pass the same samples through the model.
    Every method is collective over all trainer ranks."""

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    def deal(self, parts: Sequence[Any] | None) -> Any:
        """Object d of the main rank, on every rank of data-parallel rank d; None elsewhere than on the main rank."""

    def report(self, value: Any) -> list[Any] | None:
        """One object of each data-parallel rank, in order, on the main rank; None elsewhere."""


class Exchange:
    """Brings rows to the ranks that need them. But for `here`, every method is collective over all trainer ranks."""

    def __init__(self, homes: Homes):
        self._homes = homes
        self._kept: Sequence[Row] = ()  # of global rank 0
        self._here: dict[int, dict[str, Any]] = {}
        self._dealt: list[set[tuple[int, str]]] = []  # (row, field) that each data-parallel rank has

    def begin(self, rows: Sequence[Row] | None) -> None:
        """Forget the rows of the last step; `rows` are those of the next one, on global rank 0."""
        self._kept = rows or ()
        self._here = {}
        self._dealt = [set() for _ in range(self._homes.dp_size)]

    def share(self, groups: Sequence[Group] | None) -> list[Group]:
        """Global rank 0's groups on every rank, without their tokens, which begin a step."""
        self.begin(None if groups is None else rows_of(groups))
        catalogue: Catalogue = self._homes.broadcast(None if groups is None else Catalogue.of(groups))
        return catalogue.groups()

    def bare(self, samples: Sequence[Sample] | None) -> list[Sample]:
        """Global rank 0's samples on every rank without their tokens, which begin a step of their own; values per token
        come back to data-parallel rank 0 alone."""
        rows = None if samples is None else [row_of(sample) for sample in samples]
        found = None
        if samples is not None and rows is not None:
            found = [
                _without(sample, row, index) for index, (sample, row) in enumerate(zip(samples, rows, strict=True))
            ]
        self.begin(rows)
        return self._homes.broadcast(found)

    def fetch(self, samples: Sequence[Sample], homes: Sequence[int]) -> list[Sample]:
        """The samples, with their tokens on the data-parallel rank that `homes` has for each.

        What a rank has already, every rank has, or a sample does without (`experts`), is not sent.
        """
        wanted: list[dict[int, list[str]]] = [{} for _ in self._dealt]
        for sample, home in zip(samples, homes, strict=True):
            names = [name for name in _elsewhere(sample) if (sample.row, name) not in self._dealt[home]]
            if names:
                self._dealt[home].update((sample.row, name) for name in names)
                wanted[home][sample.row] = names
        if any(wanted):
            parts = [self._parts(rows) for rows in wanted] if self._homes.is_main else None
            self._take(wanted[self._homes.dp_rank], self._homes.deal(parts))
        return [self.here(sample) for sample in samples]

    def everywhere(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with ids and log-probs of their tokens on every rank, for methods that read them there."""
        wanted = {sample.row: [name for name in _elsewhere(sample) if name in READ] for sample in samples}
        if any(wanted.values()):
            self._take(wanted, self._homes.broadcast(self._parts(wanted) if self._homes.is_main else None))
            for dealt in self._dealt:
                dealt.update((row, name) for row, names in wanted.items() for name in names)
        return [self.here(sample) for sample in samples]

    def here(self, sample: Sample) -> Sample:
        """The sample with those of its tokens that this rank has: without a message."""
        row = self._here.get(sample.row, {})
        found: dict[str, Any] = {name: row[name] for name in _elsewhere(sample) if name in row}
        return replace(sample, **found) if found else sample

    def kept(self, sample: Sample) -> Sample:
        """The sample with its tokens, on global rank 0: without a message."""
        found: dict[str, Any] = {name: self._kept[sample.row][name] for name in _elsewhere(sample)}
        return replace(sample, **found) if found else sample

    def _parts(self, wanted: Mapping[int, Sequence[str]]) -> list[list[Any]]:
        return [[self._kept[row][name] for name in names] for row, names in wanted.items()]

    def _take(self, wanted: Mapping[int, Sequence[str]], parts: Sequence[Sequence[Any]]) -> None:
        for (row, names), values in zip(wanted.items(), parts, strict=True):
            self._here.setdefault(row, {}).update(zip(names, values, strict=True))

    def to_homes(self, values: Sequence[torch.Tensor] | None, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Global rank 0's values per token, at each sample's home; no elements elsewhere."""
        places: list[list[int]] = [[] for _ in range(self._homes.dp_size)]
        for index, sample in enumerate(samples):
            assert sample.home is not None
            places[sample.home].append(index)
        parts = None if values is None else [[values[index] for index in indices] for indices in places]
        found = dict(zip(places[self._homes.dp_rank], self._homes.deal(parts), strict=True))
        return [found.get(index, torch.empty(0)) for index in range(len(samples))]

    def to_main(self, samples: Sequence[Sample], names: Sequence[str]) -> list[Sample]:
        """The samples with these values per token on global rank 0, from their homes."""
        at_home = [
            {name: getattr(sample, name) for name in names} if sample.home == self._homes.dp_rank else None
            for sample in samples
        ]
        told = self._homes.report(at_home)
        if told is None:
            return list(samples)
        return [
            sample if sample.home is None else replace(sample, **told[sample.home][index])
            for index, sample in enumerate(samples)
        ]


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """The rows of a step's samples, in their order; siblings share their prompt's block."""
    rows: list[Row] = []
    blocks: dict[int, TokenIds] = {}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        row = tokens_of(rollout)
        prompt = row["prompt_ids"]
        if id(prompt) not in blocks:
            blocks[id(prompt)] = TokenIds(prompt)
        rows.append(row | {"prompt_ids": blocks[id(prompt)]})
    return rows


def row_of(sample: Sample) -> Row:
    return {name: getattr(sample, name) for name in READ}


def _without(sample: Sample, row: Row, place: int) -> Sample:
    lengths: dict[str, Any] = {name: Elsewhere(len(value)) for name, value in row.items()}
    return replace(sample, **lengths, row=place, home=0)


def _elsewhere(sample: Sample) -> list[str]:
    """Fields whose values this rank may not have."""
    return [name for name in FIELDS if isinstance(getattr(sample, name), Elsewhere)]
