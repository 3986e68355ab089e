"""Targets of `owpo eval`: model folders, and checkpoints of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import BEST, REACHED, RunFolder, step_name, step_of, whole_steps

NEWEST = "newest"
CONVERGED = "converged"  # the paper's word for the last checkpoint of a run that was trained to its end


@dataclass(frozen=True)
class Target:
    """Weights on disk and their row in the table.

    Example:
        Target("Qwen3-8B-Base", "owpo", ("best", "converged"), Path("runs/a/weights/step_000080"), ...)
    """

    model: str  # the base model's name in tables
    method: str
    checkpoints: tuple[str, ...]  # "best", "converged", "step 80"; a folder may have several, a model has none
    weights: Path  # HF folder, converted folder or checkpoint folder
    config: Config  # the run's; source of engine, verifier, template and seed
    out: Path

    @property
    def files(self) -> Path:
        """Folder of config.json and tokenizer."""
        return hf_folder(self.weights)

    @property
    def label(self) -> str:
        shown = f"{self.model} {self.method}".strip()
        return f"{shown} ({', '.join(self.checkpoints)})" if self.checkpoints else shown


def model_target(folder: Path, config: Config, out: Path | None) -> Target:
    """Return the target for a model folder.

    Raises:
        UserError: it is neither an HF folder nor a converted folder.
    """
    hf_folder(folder, "--model")
    name = folder.resolve().name
    return Target(name, "", (), folder, config, (out or config.runs_dir / "eval") / name)


def run_targets(run_dir: Path, config: Config, wanted: Sequence[str], out: Path | None) -> list[Target]:
    """Return the wanted checkpoints of a run, each folder once.

    Args:
        wanted: "best", "reached", "newest" or a step's number; empty: the best, if the run keeps it, and the newest.

    Raises:
        UserError: the run has no such checkpoint.
    """
    wanted = wanted or ([BEST] if (run_dir / BEST).is_dir() else []) + [NEWEST]
    steps: dict[int, tuple[Path, tuple[str, ...]]] = {}
    for one in wanted:
        folder = _checkpoint(run_dir, one)
        step = step_of(folder.name)
        first, names = steps.get(step, (folder, ()))
        finished = one == NEWEST and RunFolder(run_dir).summary.is_file()
        name = one if one in (BEST, REACHED) else CONVERGED if finished else f"step {step}"
        steps[step] = (first, (*names, name))
    out = out / run_dir.resolve().name if out else RunFolder(run_dir).evaluations
    base = config.model.path.name
    return [
        Target(base, f"{config.algorithm.name} ({config.name})", names, folder, config, out / step_name(step))
        for step, (folder, names) in steps.items()
    ]


def _checkpoint(run_dir: Path, wanted: str) -> Path:
    """Return the complete checkpoint folder step_N that `wanted` selects."""
    if wanted in (BEST, REACHED):
        link, field = run_dir / wanted, "keep_best=true" if wanted == BEST else "keep_at_score"
        if not link.is_dir():
            raise UserError("--checkpoint", wanted, f"{run_dir} has none; train with checkpoint.{field}")
        return link.resolve()
    root = RunFolder(run_dir).checkpoints
    whole = [root / step_name(step) for step in whole_steps(root)]
    if not whole:
        raise UserError("--run", run_dir, "has no checkpoint yet; evaluate its model with --model, or train it")
    if wanted == NEWEST:
        return whole[-1]
    found = [folder for folder in whole if wanted in (folder.name, folder.name.removeprefix("step_").lstrip("0"))]
    if not found:
        has = ", ".join(folder.name.removeprefix("step_").lstrip("0") for folder in whole)
        raise UserError("--checkpoint", wanted, f"give best, newest or a step that {run_dir} has: {has}")
    return found[0]
