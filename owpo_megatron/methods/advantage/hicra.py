"""HICRA: larger advantages for the tokens in which a response plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView, normalised_in_groups

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hicra(Clipped):
    """A + α abs(A) on planning tokens, A the group's z-score.

    Planning tokens are those that a phrase of `phrases` touches, in lower case. The authors extract their list of
    strategic n-grams from a corpus of solutions; the default is a short one of our own.
    """

    name = "hicra"
    summary = "S with A + α abs(A) on the tokens of planning phrases"
    paper = "arXiv:2509.03646"
    needs_text = True

    alpha: float = hyper(0.2, "Amplification α of planning tokens.", ge=0)
    phrases: str = hyper(
        "let's|wait|alternatively|we can|we need to|notice that|first|next|another way|check|therefore|suppose",
        "Planning phrases, separated by |.",
    )

    def advantages(self, step: StepView) -> Sequence[float | torch.Tensor]:
        import torch

        phrases = [phrase for phrase in self.phrases.lower().split("|") if phrase]
        out: list[float | torch.Tensor] = []
        for advantage, pieces in zip(normalised_in_groups(step, self.advantage_std), step.pieces_N, strict=True):
            raised = self.alpha * abs(advantage)
            plans = planning(pieces, phrases)
            out.append(torch.tensor([advantage + raised * inside for inside in plans]))
        return out


def planning(pieces: Sequence[str], phrases: Sequence[str]) -> list[bool]:
    """[L] whether a token has a character of a phrase.

    Example:
        >>> planning(["We", " ca", "n add"], ["we can"])
        [True, True, True]
    """
    text = "".join(pieces).lower()
    inside = [False] * len(text)
    for phrase in phrases:
        start = text.find(phrase)
        while start >= 0:
            inside[start : start + len(phrase)] = [True] * len(phrase)
            start = text.find(phrase, start + 1)
    ends = [sum(len(piece.lower()) for piece in pieces[: index + 1]) for index in range(len(pieces))]
    return [any(inside[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
