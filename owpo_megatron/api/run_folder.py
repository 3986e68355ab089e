"""A run's folder while one process works in it: locked, with the resolved configuration inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from owpo_megatron.carried import PREFIX
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.methods import find_method
from owpo_megatron.run.files import locked, whole_file
from owpo_megatron.run.layout import CONFIG, RunFolder


@dataclass(frozen=True)
class Claim:
    """A run folder that this process works in."""

    config_file: Path  # the resolved configuration
    lock: int  # descriptor to pass on to the ranks
    resumes: bool  # there are checkpoints
    changed: tuple[str, ...]  # fields that differ from the run's configuration so far, as "name before -> now"
    kept: bytes | None  # the configuration before

    def restore(self) -> None:
        """Put the former configuration back: a refused one is not the run's."""
        if self.kept is not None:
            self.config_file.write_bytes(self.kept)


@contextmanager
def claimed(config: Config, keep_config: bool = True) -> Iterator[Claim]:
    """Lock the run folder, made where it does not exist, and write the configuration into it.

    The lock ends with the block and with every process that inherited its descriptor, so that two runs never write into
    one folder. A UserError inside the block puts the former configuration back: a refused one is not the run's.

    Args:
        keep_config: this configuration becomes the run's config.yaml; False leaves that and writes it into logs/.

    Raises:
        UserError: the folder cannot be written, another process works in it, or the run was trained with a method or
            verifier given from Python that is not given now.
    """
    folder = RunFolder.of(config)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "runs_dir", config.runs_dir, f"{error.strerror}; give a folder that can be written to"
        ) from error
    with locked(folder.lock) as lock:
        if lock is None:
            raise _in_use(folder)
        resolved = folder.config if keep_config else folder.logs / CONFIG
        before = _settings(folder.config) if keep_config else {}
        resumes = keep_config and folder.has_checkpoints()
        unread = f"unknown, since {folder.config} cannot be read; it is written anew"
        changed = [unread] if before is None else changed_fields(before, config)
        if resumes and before is not None:
            _refuse_lost_parts(before, config)
        kept = resolved.read_bytes() if resolved.is_file() else None
        with whole_file(resolved) as scratch:
            config.save(scratch)
        claim = Claim(resolved, lock, resumes, tuple(changed), kept)
        try:
            yield claim
        except UserError:
            claim.restore()
            raise


def move_aside(run_dir: Path) -> Path | None:
    """Rename a run folder to the first free NAME.1, NAME.2, ...; nothing is ever deleted. None: there was none.

    Raises:
        UserError: another process works in it, and would go on writing under its old name.
    """
    if not run_dir.exists():
        return None
    folder = RunFolder(run_dir)
    with locked(folder.lock) if run_dir.is_dir() else nullcontext(0) as lock:
        if lock is None:
            raise _in_use(folder)
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir.rename(aside)
    return aside


def _in_use(folder: RunFolder) -> UserError:
    remedy = "another owpo command works in this folder: wait for it, or give this run another name=..."
    return UserError("run folder", folder.path, remedy)


def changed_fields(before: dict[str, Any], config: Config) -> list[str]:
    """Fields of `config` that differ from an earlier resolved configuration, as "name before -> now"."""
    known, now = dict(_flat(before)), dict(_flat(config.model_dump(mode="json")))
    return [f"{name} {known[name]} -> {now[name]}" for name in now if name in known and known[name] != now[name]]


def _settings(file: Path) -> dict[str, Any] | None:
    """A resolved configuration as it was written, whose method need not be known here; None: damaged; {}: no file."""
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    sections = ("model", "data", "algorithm", "verifier")
    whole = isinstance(found, dict) and all(isinstance(found.get(name, {}), dict) for name in sections)
    return found if whole else None


def _refuse_lost_parts(before: dict[str, Any], config: Config) -> None:
    for field, was, now in (
        ("algorithm.name", before.get("algorithm", {}).get("name"), config.algorithm.name),
        ("verifier.rule", before.get("verifier", {}).get("rule"), config.verifier.rule),
    ):
        if was is None or was == now or not _is_given(field, was):
            continue
        remedy = (
            f"the run so far has {was}, which was given from Python; pass it to train(...) again, or start a run of "
            "another name"
        )
        raise UserError(field, now, remedy)


def _is_given(field: str, name: str) -> bool:
    """Whether no other process finds what this name stands for."""
    if name.startswith((f"{PREFIX}__main__:", f"{PREFIX}given:")):
        return True
    if field != "algorithm.name" or name.startswith(PREFIX):
        return False
    try:
        return find_method(name).__module__ == "__main__"
    except UserError:
        return True


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
