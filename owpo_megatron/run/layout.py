"""The names of everything in a run folder, each spelled once.

runs/NAME/
    config.yaml           the resolved configuration
    metrics.jsonl         a line per step and per evaluation
    summary.json          written last: the run is finished
    checkpoints/step_N/   what a run resumes from (run/checkpoints.py)
    weights/step_N/       the best weights; best and reached are links to one of them (run/best.py)
    hf/                   the final policy as a Hugging Face folder
    rollouts/             a file per step (engine/recorded.py)
    samples/              their verdicts, a file per step (samples/record.py)
    eval/                 results of evaluations, problem by problem
    logs/                 of ranks and engines
    sync/, report/, launch/
    .lock                 held by the one command that works here

A folder of weights (a checkpoint, a best, a converted model) has the sharded tensors in state/ and the Hugging Face
folder's small files in hf/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.config import HF_FILES, Config

HF = HF_FILES
STATE = "state"
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
SCORE = "score.json"
CONVERSION = "conversion.json"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
BEST = "best"
REACHED = "reached"
_STEP = "step_"
_STEP_NAME = re.compile(r"step_(?:\d{6}|[1-9]\d{6,})", re.ASCII)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the places in it.

    Example:
        >>> RunFolder(Path("runs/mine")).metrics.as_posix()
        'runs/mine/metrics.jsonl'
    """

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        return cls(config.run_dir)

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def best(self) -> Path:
        """A link to the best weights, where the run keeps them."""
        return self.path / BEST

    @property
    def reached(self) -> Path:
        """A link to the first weights with a wanted score, where the run keeps them."""
        return self.path / REACHED

    @property
    def hf(self) -> Path:
        return self.path / HF

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def samples(self) -> Path:
        """Verdicts and token values of the rollouts."""
        return self.path / "samples"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def sync(self) -> Path:
        return self.path / "sync"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def launch(self) -> Path:
        return self.path / "launch"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def is_finished(self) -> bool:
        return self.summary.is_file()

    def has_checkpoints(self) -> bool:
        return bool(steps_in(self.checkpoints))


def step_name(step: int) -> str:
    """The name of a step's folder or file.

    Example:
        >>> step_name(20)
        'step_000020'
    """
    return f"{_STEP}{step:06d}"


def step_of(name: str) -> int:
    """The step in such a name, without an ending."""
    return int(name.removeprefix(_STEP))


def steps_in(root: Path) -> list[int]:
    """Steps of the folders in `root` that bear a step's name, whole or not, in ascending order.

    Copies and other names beside them (step_000008.bak, step_best) are no steps.
    """
    folders = root.glob(f"{_STEP}*/")
    return sorted(step_of(path.name) for path in folders if _STEP_NAME.fullmatch(path.name) and path.is_dir())


def whole_steps(root: Path) -> list[int]:
    """Those of them that are whole: a manifest is written last."""
    return [step for step in steps_in(root) if (root / step_name(step) / MANIFEST).is_file()]


def files_by_step(root: Path, ending: str) -> Iterator[Path]:
    """The files in `root` of one step each, in ascending order."""
    return iter(sorted(root.glob(f"{_STEP}*{ending}")))
