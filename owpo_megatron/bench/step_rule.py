"""The reward of `owpo bench step`, in a file of its own: the verifier's workers import no torch for it."""

from __future__ import annotations


def correct(text: str) -> bool:
    """The reward: a sum over the response's tokens, odd or even."""
    return sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) % 2 == 1


def grade(response: str, answer: str) -> bool:
    """`correct` as a rule of the verifier."""
    return correct(response)
