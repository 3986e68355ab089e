"""Rollout workers: processes on the trainer's nodes that ask engines for responses and grade them, for rank 0.

    global rank 0                          a worker, next to some rank            engines
      Fleet, plan, stream, decisions
      Generation asks for a post   --->      POST /generate              --->       draw
      rollouts with verdicts       <---      parses, checks, grades      <---

Which worker asks does not change a response: its seed and the weights decide it. So a worker that is lost costs time
alone: its posts go to the others.
"""

from owpo_megatron.workers.client import WorkersClient
from owpo_megatron.workers.handle import WorkerProcess
from owpo_megatron.workers.messages import GradingOrder
from owpo_megatron.workers.pool import WorkerPool

__all__ = ["GradingOrder", "WorkerPool", "WorkerProcess", "WorkersClient"]
