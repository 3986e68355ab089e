"""owpo bench step: seconds of whole training steps, against TRL's GRPOTrainer on the same model, prompts and lengths.

Both sides are processes that stay alive and take turns, a step each: what one pair shares is the state of the machine.
A line on a pipe starts a step, and a line of JSON comes back when it has ended; the time between is the step's, for
both alike. Steps before the counted ones warm up allocators, caches and threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from owpo_megatron.bench import step_workload
from owpo_megatron.bench.step_side import Side, ended, pipes
from owpo_megatron.bench.step_workload import WORKLOADS, Workload, run_config, write_workload
from owpo_megatron.engine.install import is_clone, project_files
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.run.files import write_whole

WARM_UP = 2
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4  # relative
PHASES = ("rollout", "verify", "logp_ref", "update", "sync")
Log = Callable[[str], None]


@dataclass(frozen=True)
class OurSide:
    """Layout in which our side runs a workload."""

    ranks: int = 1  # data-parallel ranks of the trainer
    engines: int = 1  # SGLang servers that share the responses
    deterministic: bool = True  # rollout.deterministic


def bench_step(
    workload: Workload, our: OurSide, pairs: int, log: Log, against: str | None = None, microbatch: int | None = None
) -> dict[str, Any]:
    """Measure a workload.

    Args:
        pairs: counted steps of each side; results are medians.
        against: "trl", or None for our side alone.
        microbatch: samples that TRL passes through its model at a time; None: all.

    Returns:
        {"seconds_per_step", "peer_seconds_per_step", "ratio", "phases", "peer_phases", "tokens_per_s", ...}; the ratio
        is the median of ours over the peer's, pair by pair.

    Raises:
        RunError: a side failed, or on the same tokens the losses differ by more than 1e-5, the gradients' norms by more
            than one part in 10,000.
    """
    steps = WARM_UP + pairs
    with TemporaryDirectory(prefix="owpo-step-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        write_workload(folder, workload)
        log("starting the trainer and its engine")
        ours = stack.enter_context(_our_side(folder, workload, steps, our))
        peer = None
        if against:
            log("starting TRL")
            peer = stack.enter_context(_trl_side(folder, workload, steps, microbatch))
        ours_lines, peer_lines = [], []
        for step in range(steps):
            ours_lines.append(ours.step())
            if peer:
                peer_lines.append(peer.step())
            sides = [lines[-1]["wall"] for lines in (ours_lines, peer_lines) if lines]
            log(f"step {step + 1} of {steps}: " + " against ".join(f"{wall:.2f} s" for wall in sides))
        figures = _figures(workload, ours_lines[WARM_UP:], peer_lines[WARM_UP:])
        figures["peak_bytes"] = ours.peaks() | (peer.peaks() if peer else {})
        if peer:
            log("both losses on the same tokens")
            figures |= _same_loss(folder, workload, peer_lines[0])
    return asdict(our) | figures


def find_workload(name: str) -> Workload:
    """Return a workload by name. Raises UserError where there is none."""
    if name not in WORKLOADS:
        raise UserError("--workload", name, f"use one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


@contextlib.contextmanager
def _our_side(folder: Path, workload: Workload, steps: int, our: OurSide) -> Iterator[Side]:
    from owpo_megatron.config import Config
    from owpo_megatron.launch.local import rank_command, rank_environment

    ranks = our.ranks
    raw = run_config(folder, workload, steps, ranks, our.engines, our.deterministic)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(raw))
    Config.load(config_file)
    go, done = pipes(folder, "ours", make=True)
    logs = folder / "logs"
    logs.mkdir()
    command = rank_command(ranks, logs, "owpo_megatron.bench.step_rank", [str(config_file), str(go), str(done)])
    with (logs / "launcher.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=rank_environment(ranks),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with ended(process):
        yield Side("ours", process, folder, logs / "rank_0.log", waits_first=False)


@contextlib.contextmanager
def _trl_side(folder: Path, workload: Workload, steps: int, microbatch: int | None) -> Iterator[Side]:
    settings = {
        "folder": str(folder),
        "threads": len(os.sched_getaffinity(0)),
        "microbatch": microbatch or workload.prompts * workload.group,
        "steps": steps,
        "response": workload.response,
        "prompts": workload.prompts,
        "group": workload.group,
        "beta": step_workload.BETA,
        "clip": step_workload.CLIP,
        "lr": step_workload.LEARNING_RATE,
        "clip_grad": step_workload.CLIP_GRAD,
    }
    (folder / "trl.json").write_text(json.dumps(settings))
    go, done = pipes(folder, "trl", make=True)
    script = Path(__file__).with_name("step_trl.py")
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    with (folder / "trl.log").open("wb") as log:
        process = subprocess.Popen(
            [peers_python(), script, folder / "trl.json", go, done],
            cwd=folder, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    with ended(process):
        yield Side("trl", process, folder, folder / "trl.log", waits_first=True)


def peers_python() -> Path:
    """The interpreter of TRL's environment, which is made where it is missing.

    Raises:
        UserError: this is not a clone, whose environment it builds on.
        RunError: it cannot be made.
    """
    if not is_clone():
        raise UserError("--against", "trl", "needs a clone of the repository and `make setup`; without it: none")
    home = peers_home()
    if not (home / ".made").is_file():
        script = project_files() / "tools" / "make_env.sh"
        made = subprocess.run(["bash", str(script), "peers"], env={**os.environ, "PYTHON": sys.executable})
        if made.returncode:
            raise RunError(f"the environment {home} could not be made; its log: {home / 'setup.log'}")
    return home / "bin" / "python"


def peers_home() -> Path:
    """The folder of TRL's environment."""
    return project_files() / ".venv-peers"


def _figures(
    workload: Workload, ours: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    seconds = statistics.median(line["wall"] for line in ours)
    figures = {
        "seconds_per_step": seconds,
        "phases": _medians([line["seconds"] for line in ours]),
        "cpu_seconds_per_step": statistics.median(line["cpu"] for line in ours),
        "tokens_per_s": workload.tokens / seconds,
        "seconds": [line["wall"] for line in ours],
    }
    if peer:
        figures |= {
            "peer_seconds_per_step": statistics.median(line["wall"] for line in peer),
            "peer_phases": _medians([line["phases"] for line in peer]),
            "peer_cpu_seconds_per_step": statistics.median(line["cpu"] for line in peer),
            "peer_seconds": [line["wall"] for line in peer],
            "ratio": statistics.median(mine["wall"] / theirs["wall"] for mine, theirs in zip(ours, peer, strict=True)),
        }
    return figures


def _medians(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in PHASES if any(name in line for line in lines)]
    return {name: statistics.median(line.get(name, 0.0) for line in lines) for name in names}


def _same_loss(folder: Path, workload: Workload, peer: Mapping[str, Any]) -> dict[str, Any]:
    """Our loss and gradient norm on the tokens and advantages of the peer's first step."""
    from owpo_megatron.launch.local import rank_environment

    config_file, samples_file, result_file = (folder / f"loss_{name}.json" for name in ("config", "samples", "result"))
    write_whole(config_file, json.dumps(run_config(folder, workload, 1, ranks=1)))
    names = ("prompt_ids", "completion_ids", "advantages")
    write_whole(samples_file, json.dumps({name: peer[name] for name in names}))
    command = [sys.executable, "-m", "owpo_megatron.bench.step_loss"]
    command += [str(config_file), str(samples_file), str(result_file)]
    done = subprocess.run(command, env=rank_environment(1), capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the loss on the same tokens: {done.stderr.strip().splitlines()[-1]}")
    ours = json.loads(result_file.read_text())
    if not abs(ours["loss"] - peer["loss"]) <= LOSS_TOLERANCE:
        raise RunError(f"on the same tokens our loss is {ours['loss']:.7f} and the peer's {peer['loss']:.7f}")
    if not abs(ours["grad_norm"] / peer["grad_norm"] - 1) <= NORM_TOLERANCE:
        raise RunError(
            f"on the same tokens our gradient's norm is {ours['grad_norm']:.6f} and the peer's {peer['grad_norm']:.6f}"
        )
    norms = {"grad_norm": ours["grad_norm"], "peer_grad_norm": peer["grad_norm"]}
    return {"loss_on_same_tokens": ours["loss"], "peer_loss_on_same_tokens": peer["loss"]} | norms
