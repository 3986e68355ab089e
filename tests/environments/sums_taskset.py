"""A taskset of the package `verifiers`, as its documents write one; for test_agents.py."""

import verifiers.v1 as vf


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 3)


class SumsConfig(vf.TasksetConfig):
    pass


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self) -> list[SumsTask]:
        pairs = [(a, b) for a in range(3) for b in range(3)]
        return [SumsTask(SumsData(prompt=f"{a} + {b} =", answer=str(a + b)), self.config.task) for a, b in pairs]


__all__ = ["SumsTaskset"]
