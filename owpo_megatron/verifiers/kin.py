"""The processes around a worker and its CPU time, as the kernel has them: cheap enough to look at with every item."""

from __future__ import annotations

import os
import time

from owpo_megatron.verifiers.sandbox.jail import descendants

_CPU_CLOCK = 2  # CPUCLOCK_SCHED of a process, in the lowest three bits of a clock's number: clock_getcpuclockid(3)


class Kin:
    """Looks at one worker.

    The guard is the subreaper of all that the worker starts, and leaves one of the orphans that ended uncollected: from
    the moment a rule starts a process until the worker is replaced, there is a child of the one or the other to see.
    Files of /proc stay open, so that a later process with the same number is never looked at.

    Args:
        guard: process that forked the worker.

    Raises:
        OSError: the worker has ended already.
    """

    def __init__(self, guard: int, worker: int):
        self._files: list[int] = []
        self.worker = worker
        try:
            self._tasks = self._open(f"/proc/{worker}/task")
            self._of_worker = self._open(f"/proc/{worker}/task/{worker}/children")
            self._of_guard = self._open(f"/proc/{guard}/task/{guard}/children")
        except OSError:
            self.close()
            raise

    def alone(self) -> bool:
        """Whether the worker has no child, not even one that ended, and its guard no other than the worker."""
        try:
            if os.fstat(self._tasks).st_nlink == 3:  # one thread, besides "." and ".."
                childless = not os.pread(self._of_worker, 1, 0)
            else:
                childless = not descendants(self.worker)
            return childless and os.pread(self._of_guard, 64, 0).split() == [b"%d" % self.worker]
        except OSError:
            return False

    def cpu_seconds(self) -> float:
        """CPU time of the worker; 0 when it has ended."""
        try:
            return time.clock_gettime((~self.worker << 3) | _CPU_CLOCK)
        except OSError:
            return 0.0

    def runnable(self) -> bool:
        """Whether it runs or waits for a core."""
        try:
            with open(f"/proc/{self.worker}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "R"
        except OSError:
            return False

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def _open(self, path: str) -> int:
        self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._files[-1]
