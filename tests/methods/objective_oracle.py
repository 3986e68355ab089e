"""The nine methods once more, token by token in Python's floats: no tensor, no autograd, no code of the package.

Source: One-Way Policy Optimization (arXiv:2605.22156), Eq. 2 to 7 and appendix B; GRPO's mean from DeepSeekMath.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Token:
    """One response token."""

    logp: float
    old: float
    ref: float
    advantage: float
    active: bool
    sample: int
    factor: float = 1.0  # of truncated importance sampling


PER_SAMPLE = ("grpo", "opd", "mopd")
SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "weight_low": 0.8, "weight_high": 1.2, "beta": 1e-3, "alpha": 5.0}


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def token_terms(name: str, token: Token, changed: dict[str, float]) -> tuple[float, float]:
    """(what the method maximises for this token, its derivative by the token's log-prob)."""
    s = SETTINGS | ({"clip_high": 0.2} if name == "grpo" else {}) | changed
    r = math.exp(token.logp - token.old)
    a = token.advantage
    low, high = 1 - s["clip_low"], 1 + s["clip_high"]
    if name in ("opd", "mopd"):
        alpha = s["alpha"] if name == "mopd" else 0.0
        push = 0.0 if r < low or r > high else r * (token.ref - token.logp + alpha * a)
        return push * token.logp, push
    value = min(r * a, min(max(r, low), high) * a)
    slope = 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else r * a
    if name in ("grpo", "sym_dapo"):
        lag = token.ref - token.logp
        value -= s["beta"] * (math.exp(lag) - lag - 1)
        slope -= s["beta"] * (1 - math.exp(lag))
    if name.startswith("owpo") and token.active:
        delta = sign(a) * (token.logp - token.ref)
        if name == "owpo_no_asym":
            delta = abs(delta)
        elif name == "owpo_no_locking":
            delta = min(delta, 0.0)
        elif name == "owpo_no_accel":
            delta = max(delta, 0.0)
        w = min(max(math.exp(-delta), s["weight_low"]), s["weight_high"])
        return w * value, w * slope
    return value, slope


def oracle(name: str, tokens: list[Token], **changed: float) -> tuple[float, int, list[float]]:
    """(loss sum, what it is divided by, d loss / d log-prob of each token)."""
    lengths = {sample: sum(t.sample == sample for t in tokens) for sample in {t.sample for t in tokens}}
    total, gradient = 0.0, []
    for token in tokens:
        value, slope = token_terms(name, token, changed)
        share = token.factor / (lengths[token.sample] if name in PER_SAMPLE else 1)
        total += value * share
        gradient.append(-slope * share)
    return -total, len(lengths) if name in PER_SAMPLE else len(tokens), gradient
