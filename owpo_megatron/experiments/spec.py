"""A run before it is made: its configuration, the run its reference comes from, and a key that names its folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from owpo_megatron.config import Config
from owpo_megatron.experiments.lab import with_fields
from owpo_megatron.run.layout import BEST, HF, RunFolder

# Where a run is made and by which engine does not change what comes out.
_NOT_IN_THE_KEY = ("name", "runs_dir", "engine", "sync")
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class RunSpec:
    """What has to be run once: two specs of one key are the same run, whatever their labels.

    Args:
        label: the readable part of the folder's name.
        config: without name and place.
        reference: its policy becomes the reference of this run; None: as the configuration says.
        start: its policy is what this run starts from; None: the configuration's model.
        weights: which one of their policies.

    Example:
        RunSpec("owpo-s1", config, RunSpec("dapo-s1001", ...)).folder(Path("runs/lab/runs"))
        # runs/lab/runs/owpo-s1-9f2c01ab34cd
    """

    label: str
    config: Config
    reference: RunSpec | None = None
    start: RunSpec | None = None
    weights: Literal["final", "best"] = "final"

    @cached_property
    def key(self) -> str:
        """12 hex digits of the configuration, the model's files and the reference's key."""
        # Defaults are left out, so that a field that is new tomorrow leaves the runs of today where they are.
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
        """Runs that must be done before this one."""
        return [spec for spec in (self.reference, self.start) if spec is not None]

    def folder(self, root: Path) -> Path:
        """Where the run is or will be; one of this key that was made under another label is the same run."""
        return next(root.glob(f"*-{self.key}"), root / f"{self.label}-{self.key}")

    def is_done(self, root: Path) -> bool:
        """True when the run came to its end: its summary is written last."""
        return RunFolder(self.folder(root)).is_finished

    def placed(self, root: Path) -> Config:
        """The configuration with its name and folder; the runs that it needs must be done."""
        weights = BEST if self.weights == "best" else HF
        fields = {"name": self.folder(root).name, "runs_dir": str(root)}
        if self.reference:
            fields["reference.path"] = str(self.reference.folder(root) / weights)
        if self.start:
            fields["model.path"] = str(self.start.folder(root) / weights)
        return with_fields(self.config, fields)


@cache
def model_digest(folder: Path) -> str:
    """Of the names and sizes of a model's files and the first megabyte of each."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_HEAD_BYTES))
    return digest.hexdigest()
