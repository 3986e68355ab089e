"""A user's script: a method, a verifier and callbacks of its own, all in `__main__`; prints what it saw as JSON.

python front_door_script.py CONFIG (twice | two_ranks | stop | broken | interrupt | resume_without)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron import CallbackError, Method, Terms, UserError, train


@dataclass(frozen=True)
class PlainGradient(Method):
    name = "plain_gradient"
    summary = "A log pi: the plain policy gradient."
    groups = "mixed"
    needs_old = False

    def terms(self, logp_C: Any, batch: Any) -> Terms:
        return Terms(batch.advantage_C * logp_C)


def same_text(response: str, answer: str) -> float:
    """A rule other than the task's own, which records its caller."""
    return float(response.strip() == answer.strip())


class Watch:
    def __init__(self, stop_after: int = 0, fail_after: int = 0, interrupt_after: int = 0):
        self.steps: list[int] = []
        self.checkpoints: list[int] = []
        self.ended: list[int] = []
        self._stop_after, self._fail_after, self._interrupt_after = stop_after, fail_after, interrupt_after

    def on_step(self, line: dict[str, Any]) -> bool | None:
        self.steps.append(line["step"])
        if line["step"] == self._fail_after:
            raise ValueError("no more")
        if line["step"] == self._interrupt_after:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        return line["step"] == self._stop_after

    def on_checkpoint(self, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.checkpoints.append(step)

    def on_end(self, result: Any) -> None:
        self.ended.append(result.steps)


def surroundings() -> dict[str, Any]:
    """Return the state that a call must leave unchanged."""
    import torch

    return {
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "groups": torch.distributed.is_initialized(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "random": torch.get_rng_state().sum().item(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }


def main(config: str, what: str) -> dict[str, Any]:
    given: dict[str, Any] = {"method": PlainGradient, "verifier": same_text}
    if what == "twice":
        before, watches = surroundings(), [Watch(), Watch()]
        runs = [
            train(config, [f"name={name}"], callbacks=[watch], **given)
            for name, watch in zip("ab", watches, strict=True)
        ]
        after = surroundings()
        return {
            "changed": [name for name in before if before[name] != after[name]],
            "steps": [watch.steps for watch in watches],
            "checkpoints": watches[0].checkpoints,
            "ended": watches[0].ended,
            "rewards": [list(run.metrics["reward_mean"]) for run in runs],
            "columns": list(runs[0].metrics.columns),
            "rule": runs[0].config.verifier.rule,
            "repr": repr(runs[0]),
            "html": runs[0]._repr_html_(),
        }
    if what == "two_ranks":
        watch = Watch()
        run = train(config, ["name=two", "parallel.tp=2"], callbacks=[watch], **given)
        return {
            "steps": watch.steps,
            "checkpoints": watch.checkpoints,
            "ended": watch.ended,
            "rewards": list(run.metrics["reward_mean"]),
            "left": [file.name for file in (run.run_dir / "logs").glob("given*")],
        }
    if what == "stop":
        ranks = ["name=stopped_two", "parallel.tp=2"]
        watches = [Watch(stop_after=2), Watch(), Watch(stop_after=2)]
        runs = []
        for overrides, watch in zip((["name=stopped"], ["name=stopped"], ranks), watches, strict=True):
            run = train(config, overrides, callbacks=[watch], **given)
            runs.append((run.steps, run.stopped))
        return {"runs": runs, "went_on": watches[1].steps}
    if what == "broken":
        said = []
        for ranks in (1, 2):
            try:
                overrides = [f"name=broken{ranks}", f"parallel.tp={ranks}"]
                train(config, overrides, callbacks=[Watch(fail_after=2)], **given)
            except CallbackError as error:
                said.append(str(error))
        return {"said": said}
    if what == "interrupt":
        watch = Watch(interrupt_after=2)
        try:
            train(config, ["name=interrupted", "parallel.tp=2"], callbacks=[watch], **given)
        except KeyboardInterrupt:
            return {"steps": watch.steps, "children": surroundings()["children"]}
    assert what == "resume_without"
    said = []
    for parts in ({"method": PlainGradient}, {"verifier": same_text}):
        try:
            train(config, ["name=stopped"], **parts)
        except UserError as error:
            said.append(str(error))
    return {"said": said}


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    print("RESULT " + json.dumps(main(*sys.argv[1:])), file=out)
