"""Lengths of responses for a simulation: a run's own, or a named distribution."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

from owpo_megatron.engine.recorded import load_rollouts
from owpo_megatron.errors import UserError

Draw = Callable[[random.Random], tuple[int, int]]
"""Draws (prompt tokens, response tokens) of one sample."""

_LOGNORMAL = re.compile(r"lognormal:(\d+),(\d*\.?\d+)")
PROMPT_TOKENS = 200  # of a distribution, which is of responses alone


def lengths_of(spec: str, most: int) -> Draw:
    """Return how samples' lengths are drawn.

    Args:
        spec: the folder of a run whose rollouts/ has recorded steps, or `lognormal:MEDIAN,SIGMA`.
        most: `rollout.max_response_tokens`: longer responses are cut there.

    Raises:
        UserError: neither of them.

    Example:
        >>> draw = lengths_of("lognormal:1000,0", most=4096)
        >>> draw(random.Random(0))
        (200, 1000)
    """
    match = _LOGNORMAL.fullmatch(spec)
    if match:
        median, sigma = int(match[1]), float(match[2])
        if median < 1:
            raise UserError("--lengths", spec, "the median is at least one token")

        def lognormal(rng: random.Random) -> tuple[int, int]:
            return PROMPT_TOKENS, min(most, max(1, round(rng.lognormvariate(math.log(median), sigma))))

        return lognormal
    known = recorded_lengths(Path(spec))
    if not known:
        remedy = "name a run's folder with rollouts/step_N.jsonl, or lognormal:MEDIAN,SIGMA"
        raise UserError("--lengths", spec, remedy)
    return lambda rng: rng.choice(known)


def recorded_lengths(run: Path) -> list[tuple[int, int]]:
    """(prompt, response) tokens of every rollout that a run has on disk."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [
        (len(rollout.prompt.token_ids), len(rollout.response_ids)) for file in files for rollout in load_rollouts(file)
    ]
