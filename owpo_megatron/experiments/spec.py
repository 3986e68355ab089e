"""Specification of a run: its configuration, the run that trains its reference, and the key in its folder's name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.lab import Weights, with_fields
from owpo_megatron.run.layout import BEST, HF, REACHED, RunFolder

# Where a run happens, and with which engine, does not change its result.
_NOT_IN_THE_KEY = ("name", "runs_dir", "engine", "sync", "sinks", "profile")
_HEAD_BYTES = 1 << 20
_FOLDERS: dict[Weights, str] = {"final": HF, "best": BEST, "reached": REACHED}


@dataclass(frozen=True)
class RunSpec:
    """Specification of one run: two specs with the same key are the same run, whatever their labels.

    Args:
        label: readable part of the folder's name.
        config: configuration without name and folder.
        reference: run whose policy is the reference of this one; None: as configured.
        start: run whose policy this one starts from; None: the configuration's model.
        weights: which policy of those runs to use.

    Example:
        RunSpec("owpo-s1", config, RunSpec("dapo-s1001", ...)).folder(Path("runs/lab/runs"))
        # runs/lab/runs/owpo-s1-9f2c01ab34cd
    """

    label: str
    config: Config
    reference: RunSpec | None = None
    start: RunSpec | None = None
    weights: Weights = "final"

    @cached_property
    def key(self) -> str:
        """12 hex digits that hash the configuration, the model's files and the keys of the runs it needs."""
        # Defaults are excluded, so that a new field does not change the keys of existing runs.
        settings = self.config.model_dump(mode="json", exclude_defaults=True)
        for name in _NOT_IN_THE_KEY:
            settings.pop(name, None)
        del settings["model"]["path"]
        parts: list[Any] = [settings, model_digest(self.config.model.path)]
        parts.append(self.reference.key if self.reference else None)
        if self.start:
            parts.append({"start": self.start.key})
        if self.weights != "final":
            parts.append(self.weights)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def needs(self) -> list[RunSpec]:
        """Runs that must finish before this one."""
        return [spec for spec in (self.reference, self.start) if spec is not None]

    def folder(self, root: Path) -> Path:
        """Return the run's folder; an existing folder with this key but another label is the same run."""
        return next(root.glob(f"*-{self.key}"), root / f"{self.label}-{self.key}")

    def is_done(self, root: Path) -> bool:
        """Whether the run has finished: its summary is written last."""
        return RunFolder(self.folder(root)).is_finished

    def placed(self, root: Path) -> Config:
        """Return the configuration with its name and folder; the runs that it needs must have finished.

        Raises:
            UserError: a needed run never reached its wanted score.
        """
        for needed in self.needs:
            wanted = needed.config.checkpoint.keep_at_score
            if self.weights == "reached" and needed.is_done(root) and not (needed.folder(root) / REACHED).exists():
                remedy = f"{needed.folder(root)} never had this Pass@1; lower it, or train that run for longer"
                raise UserError("checkpoint.keep_at_score", wanted, remedy)
        weights = _FOLDERS[self.weights]
        fields = {"name": self.folder(root).name, "runs_dir": str(root)}
        if self.reference:
            fields["reference.path"] = str(self.reference.folder(root) / weights)
        if self.start:
            fields["model.path"] = str(self.start.folder(root) / weights)
        return with_fields(self.config, fields)


@cache
def model_digest(folder: Path) -> str:
    """Hash the names and sizes of a model's files and the first megabyte of each."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_HEAD_BYTES))
    return digest.hexdigest()
