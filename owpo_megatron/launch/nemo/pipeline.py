"""Experiments of NeMo-Run: tasks with dependencies, on this machine, or on Slurm from a login node or over SSH.

Runs in NeMo-Run's own environment (`make nemo`). NeMo-Run 0.11.1 is used to submit only: a job's end is queried from
Slurm (its own status needs sacct, and a failed job still ends with exit code 0), and environment variables are set in
our script (its own exports are not quoted).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from owpo_megatron.errors import UserError
from owpo_megatron.launch.nemo.request import Request
from owpo_megatron.launch.slurm.cluster import JobState, from_scontrol

POLL_SECONDS = 2.0
MOST_UNKNOWN = 30  # polls in a row: a login node may be out of reach for a moment


@dataclass(frozen=True)
class SSH:
    """A login node, reached by key; `job_dir` is a folder of the cluster for NeMo-Run's own files."""

    user: str
    host: str
    job_dir: str
    identity: str | None = None


class Pipeline:
    """Tasks that depend on each other; each is a separate job.

    Args:
        name: name of the experiment.
        home: where NeMo-Run keeps its files; on Slurm without SSH, a folder that every node sees.
        where: "slurm" from here, "local" for processes of this machine, or a login node to reach by SSH.

    Example:
        pipeline = Pipeline("sweep", Path("runs/experiments"))
        train = pipeline.add(Request.of(job))
        pipeline.add(Request.command("export", "owpo convert export ...", job), after=[train])
        sys.exit(pipeline.run())
    """

    def __init__(self, name: str, home: Path, where: Literal["slurm", "local"] | SSH = "slurm"):
        self.name, self.where = name, where
        self._home = home.absolute()
        self._tasks: dict[str, tuple[Request, tuple[str, ...]]] = {}

    def add(self, request: Request, after: Sequence[str] = ()) -> str:
        """A task that starts when those of `after` have ended well; returns its name.

        Raises:
            UserError: the name is taken, or the script holds what NeMo-Run would replace.
        """
        if request.name in self._tasks:
            raise UserError("task", request.name, "is there already; give every task a name of its own")
        if "/nemo_run" in request.script:
            raise UserError(
                "task", request.name,
                "its script or working folder holds /nemo_run, which NeMo-Run replaces by a folder of its own; rename",
            )  # fmt: skip
        for name in after:
            if name not in self._tasks:
                raise UserError("after", name, f"no such task; known are {', '.join(self._tasks) or 'none'}")
        self._tasks[request.name] = (request, tuple(after))
        return request.name

    def render(self) -> dict[str, str]:
        """The batch script of every task, as NeMo-Run would submit it; of a local one, the script itself."""
        if self.where == "local":
            return {name: request.script for name, (request, _) in self._tasks.items()}
        run = self._nemo_run()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is asked for below
            with run.Experiment(self.name, log_level="WARN") as experiment:
                self._fill(run, experiment)
                experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
        return {name: next(folder.glob(f"*{name}_sbatch.sh")).read_text() for name in self._tasks}

    def submit(self) -> dict[str, int]:
        """Put every task into Slurm's queue, dependencies included; returns the job numbers by task."""
        assert self.where != "local", "local tasks are run, not submitted"
        run = self._nemo_run()
        with run.Experiment(self.name, log_level="WARN") as experiment:
            self._fill(run, experiment)
            experiment.run(detach=True)
            self._tunnel = experiment.jobs[0].executor.tunnel
        return {name: _number(job.handle) for name, job in zip(self._tasks, experiment.jobs, strict=True)}

    def run(self) -> int:
        """Run every task, wait for all, print how each ended; returns 0 when all ended well, else 1."""
        if self.where == "local":
            return self._run_here()
        return self.wait(self.submit())

    def wait(self, jobs: dict[str, int]) -> int:
        """Wait until Slurm reports that every job has ended, requeues included; returns an exit code."""
        told: dict[str, str] = {}
        unknown = 0
        while True:
            states = {name: self._state(number) for name, number in jobs.items()}
            for name, state in states.items():
                says = f"job {state.id}, {state.state.lower()} {state.reason}".rstrip()
                if told.get(name) != says:
                    print(f"{name}: {says}", flush=True)
                    told[name] = says
                if state.reason == "DependencyNeverSatisfied":
                    self._ask(f"scancel {state.number}")
            unknown = unknown + 1 if any(state.state == "UNKNOWN" for state in states.values()) else 0
            if unknown > MOST_UNKNOWN:
                print("neither scontrol nor sacct knows a job any more; its end is unknown", flush=True)
                return 1
            if all(state.ended for state in states.values()):
                return 0 if all(state.ended_well for state in states.values()) else 1
            time.sleep(POLL_SECONDS)

    def _nemo_run(self) -> Any:
        os.environ["NEMORUN_HOME"] = str(self._home)  # read when it is imported
        try:
            import nemo_run
        except ImportError as error:
            remedy = f"cannot be imported here ({error}); run `make nemo`, then use .venv-nemo/bin/python"
            raise UserError("nemo-run", sys.executable, remedy) from error
        return nemo_run

    def _fill(self, run: Any, experiment: Any) -> None:
        identities: dict[str, str] = {}
        for name, (request, after) in self._tasks.items():
            identities[name] = experiment.add(
                run.Script(inline=request.script, entrypoint="bash"),
                executor=self._executor(run, request),
                name=name,
                tail_logs=False,
                dependencies=[identities[other] for other in after] or None,
            )

    def _executor(self, run: Any, request: Request) -> Any:
        if isinstance(self.where, SSH):
            tunnel = run.SSHTunnel(
                host=self.where.host, user=self.where.user, job_dir=self.where.job_dir, identity=self.where.identity
            )
        else:
            # A local tunnel copies nothing: its folder has to be the one where NeMo-Run writes anyway.
            tunnel = run.LocalTunnel(job_dir=str(self._home / "experiments"))
        return run.SlurmExecutor(
            account=request.account,
            partition=request.partition,
            job_name_prefix="owpo-",
            nodes=request.nodes,
            ntasks_per_node=1,
            gpus_per_node=request.gpus_per_node or None,
            time=request.time or "UNLIMITED",
            exclusive=request.exclusive or None,
            mem="0" if request.exclusive else None,
            container_image=request.container,
            container_mounts=request.mounts,
            srun_args=["--mpi=none", "--cpu-bind=none"] + ["--no-container-mount-home"] * bool(request.container),
            setup_lines="\n".join(request.prologue) or None,
            additional_parameters={"open_mode": "append", **request.options},
            retries=request.retries,
            packager=run.Packager(),
            tunnel=tunnel,
            poll_estimated_start_time=False,
        )

    def _run_here(self) -> int:
        """One after the other: this machine is not a cluster."""
        run = self._nemo_run()
        ended: dict[str, str] = {}
        for name, (request, after) in self._tasks.items():
            if any(ended[other] != "SUCCEEDED" for other in after):
                ended[name] = "SKIPPED"
            else:
                with run.Experiment(f"{self.name}-{name}", log_level="WARN") as experiment:
                    script = run.Script(inline=request.script, entrypoint="bash")
                    experiment.add(script, executor=run.LocalExecutor(), name=name, tail_logs=False)
                    experiment.run(detach=False)
                found = experiment.status(return_dict=True)
                ended[name] = str(next(iter(found.values()))["status"])
            print(f"{name}: {ended[name].lower()}", flush=True)
        return 0 if set(ended.values()) == {"SUCCEEDED"} else 1

    def _state(self, number: int) -> JobState:
        shown = from_scontrol(self._ask(f"scontrol show job {number} --oneliner"))
        if shown:
            return shown[0]
        kept = self._ask(f"sacct -j {number} -X -n -P -o State").split()
        return JobState(str(number), number, kept[0] if kept else "UNKNOWN", 0, "", "", "")

    def _ask(self, command: str) -> str:
        return str(self._tunnel.run(command, hide=True, warn=True).stdout)


def _number(handle: str) -> int:
    """Slurm's number in `slurm_tunnel://nemo_run/4711/master/0`."""
    return next(int(part) for part in handle.split("/") if part.isdigit())
