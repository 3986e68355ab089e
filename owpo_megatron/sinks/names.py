"""Metrics lines as flat names and numbers, as trackers take them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers of a line; nested mappings are joined by `/`, lists and texts are left out, `@` becomes `_at_`.

    Example:
        >>> scalars({"loss": 0.5, "seconds": {"rollout": 2}, "delta_hist": [1, 2]}, "train/")
        {'train/loss': 0.5, 'train/seconds/rollout': 2.0}
        >>> scalars({"pass@1": 0.25}, "eval/")
        {'eval/pass_at_1': 0.25}
    """
    return dict(_flat(line, prefix))


def _flat(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        full = prefix + str(name).replace("@", "_at_")
        if isinstance(value, Mapping):
            yield from _flat(value, full + "/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield full, float(value)


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Fields of a configuration by dotted name, as texts.

    Example:
        >>> settings({"name": "a", "parallel": {"tp": 2}})
        {'name': 'a', 'parallel.tp': '2'}
    """
    out: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= settings(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = str(value)
    return out
