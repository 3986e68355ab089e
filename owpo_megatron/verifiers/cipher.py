"""The cipher task's rule: the whole response is the answer, symbol by symbol."""

from __future__ import annotations

from owpo_megatron.types import GradingItem, VerdictReason


def grade_cipher(item: GradingItem) -> VerdictReason:
    """`ok` if the finished response equals the answer; a truncated or empty one gives no answer."""
    if item.truncated or not item.response:
        return "no_answer"
    return "ok" if item.response == item.answer else "wrong"
