"""A run folder as a Python object: its numbers as DataFrames, its weights, rollouts and configuration."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.config import Config
from owpo_megatron.engine.recorded import load_rollouts, rollouts_path
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import STATE, RunFolder, step_name, whole_steps
from owpo_megatron.run.metrics_reader import RunMetrics, read_run

if TYPE_CHECKING:
    import pandas

_SHOWN = {"reward_mean": "reward", "loss": "loss", "grad_norm": "grad norm", "entropy": "entropy", "kl_ref": "KL ref"}


def load_run(path: Path | str) -> RunResult:
    """Read a run's folder, also while the run goes on.

    Raises:
        UserError: it is no run folder, or the run has not written a line yet.

    Example:
        run = load_run("runs/quickstart")
        run.metrics.plot(y="reward_mean")
        run.rollouts(36).groupby("id").finish_reason.count()
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise UserError("run folder", path, f"has no {folder.config.name}; give a folder that a run has made")
    return RunResult(folder.path)


@dataclass(frozen=True)
class RunResult:
    """A run so far. Everything is read from its folder when it is asked for.

    Args:
        run_dir: the run's folder.
        stopped: `train` returned because a stop was asked for, before the last step.
    """

    run_dir: Path
    stopped: bool = False

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def finished(self) -> bool:
        """The run has come to its last step."""
        return self._folder.is_finished

    @property
    def steps(self) -> int:
        """Steps that were trained."""
        lines = self._lines().steps
        return int(lines[-1]["step"]) if lines else 0

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; {} while the run is not finished."""
        file = self._folder.summary
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row per step, a column per field of metrics.jsonl; those of nested mappings have dots: seconds.rollout."""
        return _frame(self._lines().steps)

    @property
    def evaluations(self) -> pandas.DataFrame:
        """A row per evaluation: pass@1, pass@8, ...; of further sets with their names, sets.aime24.pass@1."""
        return _frame({"step": line["step"], **line["eval"]} for line in self._lines().evals)

    @cached_property
    def config(self) -> Config:
        """The resolved configuration.

        Raises:
            UserError: it names a method that is not known here; register it first.
        """
        return Config.load(self._folder.config)

    @property
    def weights(self) -> Path | None:
        """The policy as a Hugging Face folder (hf/); before the end, and where it is not exported, the newest
        checkpoint, which `model.path` takes as well. None: there is none yet."""
        if (self._folder.hf / "config.json").is_file():
            return self._folder.hf
        found = self.checkpoints
        return found[max(found)] if found else None

    @property
    def best(self) -> Path | None:
        """The weights with the best Pass@1 (`checkpoint.keep_best`), in the form of a checkpoint; None: not kept."""
        return self._folder.best if (self._folder.best / STATE).is_dir() else None

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Whole checkpoints by step."""
        root = self._folder.checkpoints
        return {step: root / step_name(step) for step in whole_steps(root)}

    def rollouts(self, step: int) -> pandas.DataFrame:
        """A row per response that was generated for a step (1 is the first), dropped groups included.

        Columns: id, prompt, answer, domain, response_ids, behaviour_logp, tokens, finish_reason, policy_version, seed.

        Raises:
            UserError: the run keeps no rollouts (`rollout.save`), or has not come to that step.
        """
        import pandas

        file = rollouts_path(self._folder.rollouts, step)
        if not file.is_file():
            remedy = f"no rollouts of it in {self._folder.rollouts}: not trained yet, replayed, or rollout.save was off"
            raise UserError("step", step, remedy)
        return pandas.DataFrame(
            {
                "id": one.prompt.id,
                "prompt": one.prompt.text,
                "answer": one.prompt.answer,
                "domain": one.prompt.domain,
                "response_ids": tuple(one.response_ids),
                "behaviour_logp": tuple(one.behaviour_logp),
                "tokens": len(one.response_ids),
                "finish_reason": one.finish_reason,
                "policy_version": one.policy_version,
                "seed": one.seed,
            }
            for one in load_rollouts(file)
        )

    def __repr__(self) -> str:
        return f"RunResult({self._head()})"

    def _repr_html_(self) -> str:
        """Show the run's state and last steps in a notebook."""
        head = f"<b>{html.escape(self.name)}</b>: {html.escape(self._head())}"
        if not self._folder.metrics.is_file():
            return head
        frame = self.metrics
        shown = [name for name in _SHOWN if name in frame]
        return head + frame[shown].rename(columns=_SHOWN).tail(5).to_html(float_format="{:.4g}".format)

    def _head(self) -> str:
        state = "finished" if self.finished else "stopped" if self.stopped else "not finished"
        steps = self.steps if self._folder.metrics.is_file() else 0
        scores = [f"{name} {value:.3f}" for name, value in self.summary.items() if name.endswith("_after")]
        return ", ".join([str(self.run_dir), f"{steps} steps", state, *scores])

    def _lines(self) -> RunMetrics:
        return read_run(self.run_dir)


def _frame(lines: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    """A row per line, indexed by step."""
    import pandas

    frame = pandas.json_normalize(list(lines))
    return frame.set_index("step") if "step" in frame else frame
