"""The environment of the generated task `lookup`: a table that only a tool can read, then the answer."""

from __future__ import annotations

from owpo_megatron.data.tasks.lookup import ASK, NOTHING, table_of
from owpo_megatron.environments.protocol import Message, Observation, Problem


class Lookup:
    """A reply `k?` reads the entry of the key k; any other reply is the answer.

    Example:
        >>> environment = Lookup()
        >>> environment.reset(Problem("lookup/train/0", "k+w=", "13", "lookup"))
        [Message(role='user', content='k+w=', continued=False)]
        >>> environment.step("0?")
        (Observation(text='-', calls=1, errors=1), False, None)
    """

    def reset(self, problem: Problem) -> list[Message]:
        self._answer, self._table = problem.answer, table_of(problem.id)
        return [Message("user", problem.text)]

    def step(self, reply: str) -> tuple[Observation | str, bool, float | None]:
        if not reply.endswith(ASK):
            return "", True, float(reply == self._answer)
        found = self._table.get(reply.removesuffix(ASK))
        return Observation(NOTHING if found is None else str(found), errors=int(found is None)), False, None
