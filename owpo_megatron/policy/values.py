"""Values per token on their way from the ranks that compute them to those that need them.

Shapes: K values per token, L tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.types import Elsewhere, Sample


class PassValues:
    """Values of the tokens of a pass: filled by the ranks that compute them, and delivered to those that need them.

    That is every rank, or each sample's home. Where its home computes a sample, nothing is sent over dp ranks.

    Args:
        names: number of values per token, K.
        computed: data-parallel rank that computes each sample.
    """

    def __init__(self, topology: Topology, samples: Sequence[Sample], names: int, computed: Sequence[int]):
        self._topology, self._samples, self._computed = topology, samples, computed
        wanted = [sample.home for sample in samples if sample.home is not None]
        assert len(wanted) in (0, len(samples)), "all samples of a pass have a home, or none"
        self._wanted = wanted or None
        own = topology.dp_rank
        lengths = [sample.loss_length for sample in samples]
        if self._wanted:
            lengths = [length if home == own else 0 for length, home in zip(lengths, computed, strict=True)]
        self.starts: list[int] = torch.tensor([0, *lengths]).cumsum(0).tolist()
        """Place of each sample's first value in `flat_K`."""
        self.flat_K = torch.zeros(names, self.starts[-1], device=cpu.device())

    def delivered(self) -> list[list[torch.Tensor]]:
        """Return, on the host, K lists of the values [L] of each sample; no elements of those with another home."""
        if self._wanted is None:
            self._topology.sum_over_data_and_stages(self.flat_K)
            lengths = [sample.loss_length for sample in self._samples]
            rows = self.flat_K.cpu().split(lengths, 1) if lengths else ()
            found = dict(enumerate(rows))
        else:
            self._topology.sum_over_context_and_stages(self.flat_K)
            found = {index: values_K.cpu() for index, values_K in self._at_home(self._wanted).items()}
        nothing = torch.empty(0)
        return [
            [
                sample.spread(found[index][k]) if index in found else nothing
                for index, sample in enumerate(self._samples)
            ]
            for k in range(len(self.flat_K))
        ]

    def _at_home(self, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """Values [K, L] by the index of the sample, of those whose home this is."""
        topology, own = self._topology, self._topology.dp_rank
        bounds = zip(self.starts[:-1], self.starts[1:], strict=True)
        parts = {
            index: self.flat_K[:, start:end]
            for index, ((start, end), home) in enumerate(zip(bounds, self._computed, strict=True))
            if home == own
        }
        if list(wanted) == list(self._computed):
            return parts
        routes: dict[tuple[int, int], list[int]] = {}
        for index, route in enumerate(zip(self._computed, wanted, strict=True)):
            routes.setdefault(route, []).append(index)
        outgoing = [routes.get((own, home), []) for home in range(topology.dp_size)]
        incoming = [routes.get((home, own), []) for home in range(topology.dp_size)]
        rows = len(self.flat_K)
        nothing = [self.flat_K[:, :0]]
        sent = [torch.cat([*nothing, *(parts[index] for index in indices)], 1).reshape(-1) for indices in outgoing]
        lengths = [[self._samples[index].loss_length for index in indices] for indices in incoming]
        received = topology.swap_over_data(sent, [rows * sum(one) for one in lengths])
        return {
            index: values_K
            for indices, sizes, part in zip(incoming, lengths, received, strict=True)
            if indices
            for index, values_K in zip(indices, part.view(rows, sum(sizes)).split(sizes, 1), strict=True)
        }


def not_finite(samples: Sequence[Sample]) -> str | None:
    """Name the first value that is not finite, among those that this rank has."""
    for sample in samples:
        for name in ("advantage", "behaviour_logp", "old_logp", "ref_logp"):
            value = getattr(sample, name)
            if value is None or isinstance(value, Elsewhere) or torch.as_tensor(value).isfinite().all():
                continue
            ids = "" if isinstance(sample.prompt_ids, Elsewhere) else f" (prompt ids {tuple(sample.prompt_ids[:8])}...)"
            return f"the {name} of a sample{ids} is not finite"
    return None
