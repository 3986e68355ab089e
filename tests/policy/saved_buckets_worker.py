"""A run that was saved and loaded, one update later, beside the run that went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def resumed_beside(model: Path, root: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Buckets, gaps between them, and how far parameters are from those of the run that went on."""
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method

    first, again = (build_policy(make_config(model, parallel=parallel)) for _ in range(2))
    plain = again
    if parallel.get("overlap"):
        plain = build_policy(make_config(model, parallel=parallel | {"overlap": "none"}), first.topology)
    for number in range(3):
        first.update(random_samples(number), make_method("owpo"))
    if first.topology.is_main:
        (root / "saved").mkdir()
    first.topology.barrier()
    first.save(root / "saved")
    for policy in dict.fromkeys((again, plain)):
        policy.restore(root / "saved", reference_is_policy=True)
    for policy in dict.fromkeys((first, again, plain)):
        policy.update(random_samples(9), make_method("owpo"))
    buckets = [bucket for buffer in first._chunks[0].buffers for bucket in buffer.buckets]
    return {
        "buckets": len(buckets),
        "gaps": sum(bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets[:-1]),
        "again": farthest(first, again),
        "one bucket": farthest(first, plain),
    }


def farthest(ours: Any, theirs: Any) -> float:
    pairs = zip(ours._chunks[0].parameters(), theirs._chunks[0].parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
