"""Damage to the folder of checkpoints between two attempts of a run."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ended import Lost, Wrong
from registry import fault
from trial import Trial

from owpo_megatron.run.sealed import seal

DAMAGED = "a damaged checkpoint is named and an older one taken"
LEFT = "what a killed run left half done is finished or removed; a full disk ends in one line"
NO_CODE = "reading weights runs no code"


def _three_checkpoints(trial: Trial) -> int:
    """A run that was killed after its third checkpoint; the newest step."""
    run = trial.start()
    run.wait_until(lambda: 3 in trial.saved(), "checkpoint 3")
    run.kill()
    return max(trial.saved())


@fault("the newest checkpoint's manifest damaged", promise=DAMAGED, by=("command", "ranks"), quick=True)
def manifest_damaged(trial: Trial) -> None:
    newest = _three_checkpoints(trial)
    file = trial.checkpoint(newest) / "manifest.json"
    content = file.read_bytes()
    damages = [
        content[: trial.rng.randrange(len(content))],
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe\x00",
        b'{"trainer.json": 7}',
    ]
    file.write_bytes(trial.rng.choice(damages))
    trial.goes_on(at_least=newest - 1, pattern=rf"the checkpoint of step {newest} is damaged")
    trial.is_noted(damaged_checkpoints=[newest])


@fault("every checkpoint damaged", promise=DAMAGED, by=("command", "ranks"))
def every_one_damaged(trial: Trial) -> None:
    """Refused in one line, and nothing is removed."""
    _three_checkpoints(trial)
    saved = trial.saved()
    for step in saved:
        file = trial.checkpoint(step) / trial.rng.choice(["trainer.json", "state/.metadata", "manifest.json"])
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    trial.train().refused(r"checkpoints = .*every checkpoint here is damaged", code=2)
    if trial.saved() != saved:
        raise Lost(f"checkpoints were {saved} and are {trial.saved()}")


@fault("folders with other names among the checkpoints", promise=LEFT, by=("command", "ranks"))
def foreign_names(trial: Trial) -> None:
    newest = _three_checkpoints(trial)
    root = trial.checkpoint(newest).parent
    names = trial.rng.sample([f"step_{newest:06d}.bak", "step_best", f"step_{newest:06d}_old", "step_9", "step_"], 3)
    for name in names:
        shutil.copytree(trial.checkpoint(newest), root / name)
    trial.goes_on(at_least=newest)
    if missing := [name for name in names if not (root / name).is_dir()]:
        raise Lost(f"copies of a user's own are gone: {missing}")


@fault("half of a checkpoint, half of a pruned one", promise=LEFT, by=("command", "ranks"))
def half_done(trial: Trial) -> None:
    """Leftovers of a run killed while one was written and another removed, by this version or an older one."""
    newest = _three_checkpoints(trial)
    root = trial.checkpoint(newest).parent
    left = [f".writing_{newest + 1:06d}", f".writing_{newest + 7:06d}", ".pruned_000001", "step_000000"]
    for name in left:
        shutil.copytree(trial.checkpoint(newest), root / name)
        (root / name / "manifest.json").unlink()
    trial.goes_on(at_least=newest)
    if stayed := [name for name in left if (root / name).exists()]:
        raise Wrong(f"left behind: {stayed}")


@fault("a checkpoint whose table runs code", promise=NO_CODE, by=("command", "ranks"))
def table_runs_code(trial: Trial) -> None:
    """Hashes are right, as one who writes into the folder can make them; no line of it is executed."""
    newest = _three_checkpoints(trial)
    target = trial.folder / "PWNED"
    file = trial.rng.choice(["state/.metadata", "state/common.pt"])
    for step in trial.saved():
        folder, scratch = trial.checkpoint(step), trial.folder / f"scratch_{step}"
        folder.rename(scratch)
        (scratch / file).write_bytes(pickle.dumps(_Touch(target)))
        (scratch / "manifest.json").unlink()
        seal(scratch, folder)
    ended = trial.train()
    if target.exists():
        raise Wrong(f"the code in {file} was run:\n{ended.text[-2000:]}")
    ended.refused(rf"{file.rpartition('/')[2]}", code=2)
    if max(trial.saved()) != newest:
        raise Lost(f"checkpoints are {trial.saved()}")


class _Touch:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system in memory at this folder; False where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("the disk becomes full", promise=LEFT, by=("command", "ranks"))
def disk_full(trial: Trial) -> None:
    """One line names it; with more room the run goes on from its last whole checkpoint to the right end."""
    runs = Path(trial.settings["runs_dir"])
    size = trial.rng.randint(2, 6)
    with _small_disk(runs, f"{size}m") as mounted:
        if not mounted:
            raise Wrong("this kind needs a user who may mount a tmpfs")
        filler = runs / "filler"
        run = trial.start()
        run.wait_until(lambda: not run.is_running() or _filled(filler, runs, trial), "the disk is full")
        ended = run.wait()
        if ended.code == 0:
            raise Wrong(f"the disk was full, and the run is done:\n{ended.text}")
        ended.refused(r"no room|became full|No space left|disk", code=ended.code)
        saved = max(trial.saved(), default=0)
        subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
        trial.goes_on(at_least=saved)
        for line in (trial.run_dir / "metrics.jsonl").read_text().splitlines():
            json.loads(line)


@fault("a disk too small for a checkpoint", promise=LEFT, by=("command", "ranks"))
def disk_too_small(trial: Trial) -> None:
    """End in one line in the middle of the first one; half a checkpoint is none."""
    runs = Path(trial.settings["runs_dir"])
    with _small_disk(runs, f"{trial.rng.randint(300, 700)}k") as mounted:
        if not mounted:
            raise Wrong("this kind needs a user who may mount a tmpfs")
        trial.train().refused(r"became full while the checkpoint of step 1 was written .*starts from the beginning")
        if trial.saved():
            raise Wrong(f"half a checkpoint counts: {trial.saved()}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
        trial.goes_on()


@fault("too little room for the next checkpoint", promise=LEFT, by=("command", "ranks"))
def too_little_room(trial: Trial) -> None:
    """Room for everything else: the size of the last checkpoint is asked for before the next one is begun."""
    runs = Path(trial.settings["runs_dir"])
    with _small_disk(runs, "64m") as mounted:
        if not mounted:
            raise Wrong("this kind needs a user who may mount a tmpfs")
        trial.train("optimizer.steps=2").done()
        needed = sum(file.stat().st_size for file in trial.checkpoint(2).rglob("*") if file.is_file())
        filler, spare = runs / "filler", int(needed * trial.rng.uniform(0.4, 0.8))
        filler.write_bytes(bytes(shutil.disk_usage(runs).free - spare))
        trial.train().refused(r"no room for the checkpoint of step 3: [\d.]+ [MG]iB are free at .*goes on from step 2")
        filler.unlink()
        trial.goes_on(at_least=2)


def _filled(filler: Path, runs: Path, trial: Trial) -> bool:
    """Take what is left of the disk, from the first checkpoint on."""
    if trial.saved():
        with filler.open("ab") as file:
            try:
                while shutil.disk_usage(runs).free:
                    file.write(bytes(min(65536, shutil.disk_usage(runs).free)))
                    file.flush()
            except OSError:
                pass
            return True
    return False
