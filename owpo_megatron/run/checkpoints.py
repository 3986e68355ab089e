"""Checkpoints of a run: an atomic folder each, with a manifest of hashes; a run resumes from the newest complete one.

step_000020/
    state/         policy, optimizer, scheduler and reference (sharded, torch_dist)
    hf/            config.json, tokenizer and the like: with state/ it is a converted folder, as `model.path` takes it
    trainer.json   step, reference version, prompt stream, best evaluations
    manifest.json  sha256 of every file; written last, so its presence marks a complete folder

There is no random state to save: nothing is dropped out, prompts come from (seed, epoch), samples from their own seeds.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from owpo_megatron.errors import RunError, UserError
from owpo_megatron.run.layout import MANIFEST, STATE, TRAINER, step_name, steps_in, whole_steps
from owpo_megatron.run.sealed import bytes_in, fault_of, seal, verify_manifest

_WRITING, _PRUNED = ".writing_", ".pruned_"
# The last two are torch's writers: of zip files, which finds fewer bytes in a file than it wrote, and of a file by its
# name, whose stream gives no reason.
_FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc", "iostream error")


class CheckpointFolder:
    """The checkpoints/ folder of a run, as one rank sees it (global rank 0 writes)."""

    def __init__(self, root: Path, keep: int):
        self._root = root
        self._keep = keep
        self._described: dict[str, Any] | None = None  # the state of a checkpoint that is being written
        self.damaged: dict[int, str] = {}
        """Newer checkpoints that `newest` passed over, with what is wrong with each."""

    def path(self, step: int) -> Path:
        return self._root / step_name(step)

    def start(self, step: int) -> Path:
        """An empty folder for the sharded state of a new checkpoint; `finish` makes it count.

        Raises:
            RunError: the disk has less room than the last checkpoint took.
        """
        scratch = self._scratch(step)
        shutil.rmtree(scratch, ignore_errors=True)
        self._root.mkdir(parents=True, exist_ok=True)
        steps = self.steps()
        needed, free = bytes_in(self.path(steps[-1])) if steps else 0, shutil.disk_usage(self._root).free
        if free < needed:
            raise RunError(
                f"no room for the checkpoint of step {step}: {_size(free)} are free at {self._root}, and it takes "
                f"{_size(needed)}; free some and start the same command again: it goes on from step {steps[-1]}"
            )
        with self.disk_errors(step):
            (scratch / STATE).mkdir(parents=True)
        return scratch / STATE

    @contextlib.contextmanager
    def disk_errors(self, step: int) -> Iterator[None]:
        """Turns a disk that is full while a checkpoint is written into one line.

        Raises:
            RunError: no space is left; whole checkpoints are as they were.
        """
        try:
            yield
        except BaseException as error:
            if not _is_disk_full(error):
                raise
            steps = self.steps()
            rest = f"it goes on from step {steps[-1]}" if steps else "it starts from the beginning"
            raise RunError(
                f"the disk at {self._root} became full while the checkpoint of step {step} was written "
                f"({_size(shutil.disk_usage(self._root).free)} are free); free some and start the same command again: "
                f"{rest}"
            ) from error

    def state_path(self, step: int) -> Path:
        return self._scratch(step) / STATE

    def describe(self, step: int, trainer_state: dict[str, Any]) -> None:
        """Add the trainer's state; until `complete`, it is one of `trainer_states`."""
        with self.disk_errors(step):
            (self._scratch(step) / TRAINER).write_text(json.dumps(trainer_state, indent=1))
        self._described = trainer_state

    def complete(self, step: int, known: Mapping[str, str] = MappingProxyType({})) -> Path:
        """Add the manifest, rename into place, remove the oldest beyond `keep`.

        Args:
            known: hashes of files of the sharded state, by name.
        """
        with self.disk_errors(step):
            seal(self._scratch(step), self.path(step), {f"{STATE}/{name}": sha for name, sha in known.items()})
        self._described = None
        for old in self.steps()[: -self._keep]:
            self._remove(old)
        return self.path(step)

    def finish(self, step: int, trainer_state: dict[str, Any]) -> Path:
        """`describe` and `complete`."""
        self.describe(step, trainer_state)
        return self.complete(step)

    def tidy(self) -> None:
        """Finish what a killed process left half done: a folder being put in its place, pruned or written.

        What was written to the end is kept; half a checkpoint goes, unless there is no whole one beside it.
        """
        if not self._root.is_dir():
            return
        for name in sorted(os.listdir(self._root), reverse=True):  # .writing_N is newer than .step_N.old-PID
            folder = self._root / name
            step = _step_within(name)
            if step is None or not folder.is_dir():
                continue
            if not name.startswith(_PRUNED) and not self.path(step).exists() and verify_manifest(folder):
                os.replace(folder, self.path(step))
            else:
                shutil.rmtree(folder)
        whole = self.steps()
        for step in steps_in(self._root):
            if whole and step < whole[-1] and step not in whole:
                self._remove(step)

    def steps(self) -> list[int]:
        """Steps of the folders that have a manifest, oldest first."""
        return whole_steps(self._root)

    def trainer_states(self) -> list[dict[str, Any]]:
        """The states of all readable checkpoints, oldest first, without checking hashes; also that of the one which is
        being written."""
        states = []
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # damaged: never resumed either
                states.append(json.loads((self.path(step) / TRAINER).read_text()))
        return states if self._described is None else [*states, self._described]

    def began_on(self) -> datetime.date | None:
        """The day on which the run began, as its newest checkpoint has it; None where there is none."""
        states = self.trainer_states()
        return _date_in(states[-1]) if states else None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """(folder of the sharded state, trainer's state) of the newest checkpoint whose hashes are right, or None.

        Raises:
            UserError: there are checkpoints, but every one is damaged.
        """
        self.damaged = {}
        for step in reversed(steps_in(self._root)):
            folder = self.path(step)
            fault = fault_of(folder)
            state = None if fault else _state_in(folder)
            if state is not None:
                return folder / STATE, state
            self.damaged[step] = fault or f"{TRAINER} is no state of a run"
        if self.damaged:
            found = "; ".join(f"{step_name(step)}: {fault}" for step, fault in self.damaged.items())
            remedy = (
                f"every checkpoint here is damaged ({found}); put a copy back, or move the folder away to start over"
            )
            raise UserError("checkpoints", self._root, remedy)
        return None

    def read(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The same of one given folder.

        Raises:
            UserError: it is not a whole checkpoint.
        """
        if not (folder / MANIFEST).is_file():
            raise UserError("--checkpoint", folder, "not a whole checkpoint; give a step_... folder of a run")
        fault = fault_of(folder)
        state = None if fault else _state_in(folder)
        if state is None:
            fault = fault or f"{TRAINER} is no state of a run"
            raise UserError("--checkpoint", folder, f"is damaged: {fault}; give another step_... folder")
        return folder / STATE, state

    def _scratch(self, step: int) -> Path:
        return self._root / f"{_WRITING}{step:06d}"

    def _remove(self, step: int) -> None:
        """Under another name first: half of it is never taken for a checkpoint."""
        pruned = self._root / f"{_PRUNED}{step:06d}"
        shutil.rmtree(pruned, ignore_errors=True)
        os.replace(self.path(step), pruned)
        shutil.rmtree(pruned)


def began_on(checkpoint: Path) -> datetime.date | None:
    """The day on which the run of a checkpoint began; None where the folder has no such file, or an older one."""
    file = checkpoint / TRAINER
    return _date_in(json.loads(file.read_text())) if file.is_file() else None


def _date_in(state: dict[str, Any]) -> datetime.date | None:
    date = state.get("rollouts", {}).get("date")
    return None if date is None else datetime.date.fromisoformat(date)


def _state_in(folder: Path) -> dict[str, Any] | None:
    """The trainer's state; None where the file is none: its hash was right, so it was written so."""
    try:
        state = json.loads((folder / TRAINER).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("step"), int) else None


def _step_within(name: str) -> int | None:
    """The step of a folder that a run was still working on: .writing_N, .pruned_N, .step_N.old-PID."""
    match = re.fullmatch(r"\.(?:writing_|pruned_|step_)(\d{6,})(?:\.old-\d+)?", name)
    return int(match[1]) if match else None


def _is_disk_full(error: BaseException) -> bool:
    """Whether a full disk is the reason of an error of writing, also inside torch's report of several ranks."""
    seen: BaseException | None = error
    while seen is not None:
        of_ranks = [failure[0] for failure in getattr(seen, "failures", {}).values()]  # torch's CheckpointException
        if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in (seen, *of_ranks)):
            return True
        if any(sign in str(one) for one in (seen, *of_ranks) for sign in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
