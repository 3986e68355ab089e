"""Base of the methods that contrast the siblings of a prompt: one function of a group's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.prepare import linear_terms, slopes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Contrast(Method):
    """Maximises the mean over groups of `of_group`. Subclasses write that.

    Groups weigh by their size where sizes differ: the sum over responses of their group's value, over the number of
    responses.
    """

    coupling = "group"
    divisor = "sample_sums"

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        out: dict[int, dict[str, float | torch.Tensor]] = {}
        for number in sorted({one.group for one in samples}):
            indices = [index for index, one in enumerate(samples) if one.group == number]
            group = [samples[index] for index in indices]

            def total(logps: list[torch.Tensor], group: list[SampleView] = group) -> torch.Tensor:
                return len(group) * self.of_group(logps, group)

            out |= dict(zip(indices, slopes(group, total), strict=True))
        return [out[index] for index in range(len(samples))]

    def of_group(self, logps: list[torch.Tensor], group: Sequence[SampleView]) -> torch.Tensor:
        """The scalar to be maximised, of the current log-probs [L] of a group's responses, which carry the gradient."""
        raise AssertionError(f"{self.name} has no value of a group")

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return linear_terms(logp_C, batch)


def right_of(group: Sequence[SampleView]) -> torch.Tensor:
    """[G] bool: responses with a reward above 0."""
    import torch

    return torch.tensor([one.reward > 0 for one in group])
