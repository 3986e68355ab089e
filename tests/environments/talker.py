"""An environment of a module of its own: importing a test's brings torch along."""

from __future__ import annotations

import time

from owpo_megatron.data.problem import Message, Problem


class Talker:
    """Answers `a` with `b` and `b` with `a`, for ever; `w` hangs. Each turn but the first is worth a quarter."""

    def reset(self, problem: Problem) -> list[Message]:
        self.turns = 0
        return [Message("user", problem.text)]

    def step(self, reply: str) -> tuple[str, bool, dict[str, float]]:
        if reply == "w":
            time.sleep(600)
        self.turns += 1
        rewards = {"reward": 0.25, "talk": 1.0} if self.turns > 1 else {}
        return ("b" if reply == "a" else "a"), False, rewards
