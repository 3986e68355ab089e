"""Tokens per second of each phase, and the model FLOPs utilisation (MFU), from a step's line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Dense peak of one GPU in bfloat16, FLOP/s, from its vendor's data sheet. The first name that fits counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: str | None, dtype: str) -> float | None:
    """Peak of a GPU by its name; None: not known, or not computed in bfloat16.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") / 1e12
        989.0
    """
    if device is None or dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device.upper()), None)


@dataclass(frozen=True)
class Speed:
    """Cost of a model's passes, and the peak of its ranks.

    Args:
        matmul_flops: of one token's forward pass, 2 per active parameter outside the embedding.
        attention_flops: of one token's forward pass, per token of its sequence, causal: scores and values of half of
            it on average, 2 * layers * query width.
        ranks: number of trainer ranks.
        peak: FLOP/s of one rank's device; None: no MFU.
    """

    matmul_flops: float
    attention_flops: float
    ranks: int
    peak: float | None = None

    def of(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Numbers of a step's line; phases that did not run are left out.

        `tokens_per_second_rollout` counts generated tokens, the trainer's phases prompt and response tokens of every
        sample. An update is three forward passes' worth; recomputation counts as nothing done. `mfu_*` is of all ranks.
        """
        seconds, found = line.get("seconds", {}), {}
        generated, packed = line.get("tokens_generated"), line.get("tokens_packed")
        generating = line.get("generation_seconds") or seconds.get("rollout")  # the former where it went on beside
        if generated and generating:
            found["tokens_per_second_rollout"] = round(generated / generating, 1)
        for phase, passes in (("logp_old", 1), ("update", 3)):
            if packed and seconds.get(phase):
                found[f"tokens_per_second_{phase}"] = round(packed / seconds[phase], 1)
                if self.peak:
                    done = passes * packed * self.flops_per_token(packed / line["samples_trained"])
                    found[f"mfu_{phase}"] = round(done / (seconds[phase] * self.ranks * self.peak), 4)
        return found

    def flops_per_token(self, length: float) -> float:
        """FLOPs per token of a forward pass over sequences of this mean length."""
        return self.matmul_flops + self.attention_flops * length
