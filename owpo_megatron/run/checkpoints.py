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
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.files import put_in_place
from owpo_megatron.run.layout import MANIFEST, STATE, TRAINER, step_name, whole_steps


class CheckpointFolder:
    """The checkpoints/ folder of a run, as one rank sees it (global rank 0 writes)."""

    def __init__(self, root: Path, keep: int):
        self._root = root
        self._keep = keep

    def path(self, step: int) -> Path:
        return self._root / step_name(step)

    def start(self, step: int) -> Path:
        """An empty folder for the sharded state of a new checkpoint; `finish` makes it count."""
        scratch = self._scratch(step)
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / STATE).mkdir(parents=True)
        return scratch / STATE

    def state_path(self, step: int) -> Path:
        return self._scratch(step) / STATE

    def finish(self, step: int, trainer_state: dict[str, Any]) -> Path:
        """Add the trainer's state and the manifest, rename into place, remove the oldest beyond `keep`."""
        scratch = self._scratch(step)
        (scratch / TRAINER).write_text(json.dumps(trainer_state, indent=1))
        seal(scratch, self.path(step))
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old))
        return self.path(step)

    def steps(self) -> list[int]:
        """Steps of the folders that have a manifest, oldest first."""
        return whole_steps(self._root)

    def trainer_states(self) -> list[dict[str, Any]]:
        """Read the states of all readable checkpoints on disk, oldest first, without checking hashes."""
        states = []
        for step in self.steps():
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # damaged: never resumed either
                states.append(json.loads((self.path(step) / TRAINER).read_text()))
        return states

    def began_on(self) -> datetime.date | None:
        """The day on which the run began, as its newest checkpoint has it; None where there is none."""
        states = self.trainer_states()
        return _date_in(states[-1]) if states else None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """(folder of the sharded state, trainer's state) of the newest checkpoint whose hashes are right, or None.

        Raises:
            UserError: there are checkpoints, but every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.path(step)
            if verify_manifest(folder):
                return folder / STATE, json.loads((folder / TRAINER).read_text())
        if steps:
            remedy = "every checkpoint here is damaged; move the folder away to start over"
            raise UserError("checkpoints", self._root, remedy)
        return None

    def read(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The same of one given folder.

        Raises:
            UserError: it is not a whole checkpoint.
        """
        if not (folder / MANIFEST).is_file() or not verify_manifest(folder):
            raise UserError("--checkpoint", folder, "not a whole checkpoint; give a step_... folder of a run")
        return folder / STATE, json.loads((folder / TRAINER).read_text())

    def _scratch(self, step: int) -> Path:
        return self._root / f".writing_{step:06d}"


def began_on(checkpoint: Path) -> datetime.date | None:
    """The day on which the run of a checkpoint began; None where the folder has no such file, or an older one."""
    file = checkpoint / TRAINER
    return _date_in(json.loads(file.read_text())) if file.is_file() else None


def _date_in(state: dict[str, Any]) -> datetime.date | None:
    date = state.get("rollouts", {}).get("date")
    return None if date is None else datetime.date.fromisoformat(date)


def seal(scratch: Path, folder: Path) -> None:
    """Add the manifest to a folder and rename it into place, where from then on it counts as whole."""
    files = sorted(file for file in scratch.rglob("*") if file.is_file())
    manifest = {str(file.relative_to(scratch)): _sha256(file) for file in files}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
    put_in_place(scratch, folder)


def verify_manifest(folder: Path) -> bool:
    """True when every file of the manifest is there with its hash."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return all((folder / name).is_file() and _sha256(folder / name) == sha for name, sha in manifest.items())


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
