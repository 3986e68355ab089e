"""Colour of a token by its value, on a terminal and on the report's page."""

from __future__ import annotations

from typing import Literal

Side = Literal["below", "above"]

SCALES = {"w": (1.0, 0.2), "ratio": (0.0, 0.5), "logp": (0.0, 3.0)}
"""Neutral value, and the distance from it at which the colour is full."""
LEGENDS = {
    "w": "w: blue below 1, ahead of the reference, the gain is locked; orange above 1, behind it, accelerated",
    "ratio": "log-ratio of policy to reference: blue where the policy is less likely, orange where it is more likely",
    "logp": "the engine's log-prob: the stronger the blue, the less likely the token was",
}
FAINTEST = 0.04


def shade(value: float | None, color: str | None) -> tuple[Side, float] | None:
    """(side of the neutral value, strength from 0 to 1) of a token's value; None: not coloured.

    Example:
        >>> shade(0.9, "w")
        ('below', 0.5)
        >>> shade(1.0, "w") is None
        True
    """
    if value is None or color is None:
        return None
    neutral, full = SCALES[color]
    distance = (value - neutral) / full
    strength = round(min(abs(distance), 1.0), 4)
    return None if strength < FAINTEST else ("below" if distance < 0 else "above", strength)
