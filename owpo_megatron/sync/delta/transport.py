"""Transport of changes only, for engines that are reached through a slow file system.

    trainer (rank 0)                        sync.folder               next to each far engine (`owpo serve`)
    compares with its copy of what     ->   update.json,         ->   mirror: patches a copy of its own,
    engines have, element by element,       changes-00001 ...         verifies it by its hashes
        and patches the copy likewise
    engines on this machine load                                      the engine loads the mirror's copy
        the trainer's copy                                                by update_weights_from_disk

A mirror that is new or missed an update gets all weights, as the files of the trainer's copy.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from owpo_megatron.sync.bucket import Bucket
from owpo_megatron.sync.delta.encoding import Form, Patch
from owpo_megatron.sync.delta.weight_folder import Manifest, WeightFolder, write_patches
from owpo_megatron.sync.push import WeightEngine, on_all


class DeltaTransport:
    """Works with engines on this machine, and with engines that have a mirror and see `shared`.

    Args:
        shared: folder for the updates that mirrors read, removed when all have them; no other run may use it.
        copies: parent folder of the trainer's copy of the weights, which is as large as the model. An RL update changes
            few elements but nearly every page, so on a disk it would rewrite all of it.
    """

    max_bucket_bytes: int | None = None

    def __init__(self, shared: Path, copies: Path):
        self._shared, self._copies = shared.absolute(), copies.absolute()
        self._copy: WeightFolder | None = None
        self.written_bytes = 0
        """Bytes that the last update wrote into `shared`."""

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        far = [engine for engine in engines if not engine.shares_memory]
        held = {engine.url: state for engine, state in zip(far, on_all(far, mirrored) if far else [], strict=True)}
        copy = self._ready_copy()
        base = copy.state
        behind = {url for url, state in held.items() if base is None or state != base}
        # a unique name: no file system can have stale attributes cached for it
        update = self._shared / f"weights_{version}_{uuid.uuid4().hex[:8]}"
        patches, whole = _PatchWriter(update / "patches"), update / "whole"

        def take(bucket: Bucket) -> None:
            if base is None:
                copy.add(bucket)
                return
            changed = copy.replace(bucket)
            if len(behind) < len(far):
                patches.add(changed)

        def load(engine: WeightEngine) -> None:
            folder = copy.path
            if not engine.shares_memory:
                how, source = ("fill", whole) if engine.url in behind else ("patch", patches.folder)
                folder = Path(engine.call_mirror(how, {"folder": str(source)})["folder"])
            engine.update_from_disk(str(folder))

        try:
            yield take
            state = copy.seal()
            self.written_bytes = 0
            if len(behind) < len(far):
                self.written_bytes += patches.finish(base, state, copy.digests)
            if behind:
                shutil.copytree(copy.path, whole, ignore=lambda _, names: [name for name in names if name[0] == "."])
                self.written_bytes += sum(file.stat().st_size for file in whole.iterdir())
            on_all(engines, load)
        finally:
            shutil.rmtree(update, ignore_errors=True)

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _ready_copy(self) -> WeightFolder:
        """Return the copy of what engines hold; empty before the first update and after one that was interrupted."""
        if self._copy is None or self._copy.state is None:
            self.close()
            self._copy = WeightFolder(self._copies)
            for leftover in self._shared.glob("weights_*"):  # left by a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        return self._copy


def mirrored(engine: WeightEngine) -> str | None:
    """Return the state of the weights that an engine's mirror holds."""
    state = engine.call_mirror("state", {})["state"]
    return None if state is None else str(state)


class _PatchWriter:
    """Writes the files of one update: one file per bucket, and last the manifest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = 0
        self._forms: dict[str, Form] = {}
        self._bytes = 0

    def add(self, patches: Mapping[str, Patch]) -> None:
        if patches:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files += 1
            self._bytes += write_patches(patches, self.folder / f"changes-{self._files:05d}.safetensors")
            self._forms.update((name, patch.form) for name, patch in patches.items())

    def finish(self, base: str | None, state: str, digests: Callable[[Iterable[str]], dict[str, str]]) -> int:
        """Write the manifest; return the bytes that the update wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(base, state, digests(self._forms), self._forms)
        return self._bytes + manifest.write(self.folder)
