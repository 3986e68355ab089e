"""Starts the trainer for a configuration: checks, run folder, ranks, exit code. Shared by train, eval, quickstart."""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.markup import escape

from owpo_megatron.cli.options import err, out
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def run_trainer(
    config: Config,
    arguments: Sequence[str] = (),
    fresh: bool = False,
    keep_config: bool = True,
    module: str = "owpo_megatron.trainer.main",
) -> bool:
    """Run the trainer on this machine's ranks, or in this process where torchrun started it.

    Returns:
        True when it came to its end, False when it was stopped on request and can go on.

    Args:
        arguments: further arguments of the trainer.
        fresh: move an existing run folder aside first.
        keep_config: this configuration becomes the run folder's config.yaml.
        module: the trainer, as `python -m` takes it.

    Raises:
        UserError: preflight found a mistake, or another process works in this run folder.
        typer.Exit: the run failed; the reason was printed. Code 1, or 2 for a user's mistake.
    """
    from owpo_megatron.launch.local import run_ranks
    from owpo_megatron.launch.machine import launcher_leftovers, started_by_torchrun
    from owpo_megatron.launch.preflight import preflight

    preflight(config)
    if started_by_torchrun():
        _run_this_rank(config, arguments, fresh, module)
        return True
    leftovers = ", ".join(f"{name}={value}" for name, value in launcher_leftovers().items())
    if leftovers:
        err.print(f"[yellow]note:[/yellow] {escape(leftovers)} in the environment: left by another launcher, not used")
    if fresh:
        move_aside(config.run_dir)
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "runs_dir", config.runs_dir, f"{error.strerror}; give a folder that can be written to"
        ) from error
    with _only_one(config.run_dir) as lock:
        resolved = config.run_dir / "config.yaml" if keep_config else config.run_dir / "logs" / "config.yaml"
        if keep_config:
            _announce(config)
        before = resolved.read_bytes() if resolved.is_file() else None
        config.save(resolved)
        outcome = run_ranks(
            ["--config", str(resolved), *arguments],
            config.parallel.world_size,
            config.run_dir / "logs",
            module,
            notify=lambda text: err.print(text, markup=False),
            lock=lock,
        )
        if outcome.code == 2 and before is not None:  # a refused configuration is not the run's
            resolved.write_bytes(before)
    if outcome.stopped:
        out.print(_kept_by(config.run_dir))
        if outcome.code:
            raise typer.Exit(outcome.code)
        return False
    if outcome.code:
        word = "error" if outcome.code == 2 else "failed"
        where = f" [dim](more in {escape(str(outcome.log))})[/dim]" if outcome.log and outcome.code != 2 else ""
        err.print(f"[bold red]{word}:[/bold red] {escape(outcome.reason)}{where}")
        raise typer.Exit(outcome.code)
    return True


def _kept_by(run_dir: Path) -> str:
    """Line about what a stopped run left on disk."""
    steps = sorted((run_dir / "checkpoints").glob("step_*/manifest.json"))
    if not steps:
        return "stopped before the first checkpoint; nothing was kept, and the same command starts again from step 0"
    step = int(steps[-1].parent.name.removeprefix("step_"))
    return f"stopped; saved up to step {step}, and the same command resumes there"


def move_aside(run_dir: Path) -> Path | None:
    """Rename a run folder to the first free NAME.1, NAME.2, ...; nothing is ever deleted. None: there was none."""
    if not run_dir.exists():
        return None
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    out.print(f"the earlier run is now {escape(str(aside))}")
    return aside


def has_checkpoints(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step_*"))


def _announce(config: Config) -> None:
    if not has_checkpoints(config.run_dir):
        return
    out.print(f"resuming {escape(str(config.run_dir))} (--fresh starts over and keeps this one aside)")
    changed = _changed_fields(config)
    if changed:
        out.print(f"[yellow]changed since it was started:[/yellow] {escape(', '.join(changed))}")


def _changed_fields(config: Config) -> list[str]:
    file = config.run_dir / "config.yaml"
    if not file.is_file():
        return []
    before, now = (dict(_flat(part.model_dump(mode="json"))) for part in (Config.load(file), config))
    return [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]


def _flat(node: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _run_this_rank(config: Config, arguments: Sequence[str], fresh: bool, module: str) -> None:
    if fresh:
        raise UserError("--fresh", True, "torchrun's ranks would race for the folder: move it aside by hand")
    rank = int(os.environ["RANK"])
    name = "config.yaml" if rank == 0 else f"logs/config_rank_{rank}.yaml"
    config.save(config.run_dir / name)
    sys.argv = [module, "--config", str(config.run_dir / name), *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def _only_one(run_dir: Path) -> Iterator[int]:
    """A lock that goes with this process and the ranks it started, so that two runs never write into one folder."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "another owpo command works in this folder: wait for it, or give this run another name=..."
            raise UserError("run folder", run_dir, remedy) from error
        yield file.fileno()
