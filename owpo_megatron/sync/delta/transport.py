"""Weights as changes of the ones before, for engines that a slow file system reaches.

    trainer (rank 0)                        sync.folder               beside each far engine (`owpo serve`)
    compares with its copy of what     ->   update.json,         ->   mirror: changes a copy of its own,
    engines have, element by element,       changes-00001 ...         proves it by its hashes
    and changes the copy alike
    engines of this machine load                                      the engine loads the mirror's copy,
    the trainer's copy                                                by update_weights_from_disk

A mirror that is new or missed an update gets all weights: the files of the trainer's copy.
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
    """Works with engines of this machine, and with those that have a mirror and see `shared`.

    Args:
        shared: where updates are put for mirrors, and taken away when all have them; of this run alone.
        copies: where the trainer's copy of the weights is made, as large as the model. With reinforcement learning few
            elements change, but nearly every page: on a disk all of it would be written anew with each update.
    """

    max_bucket_bytes: int | None = None

    def __init__(self, shared: Path, copies: Path):
        self._shared, self._copies = shared.absolute(), copies.absolute()
        self._copy: WeightFolder | None = None
        self.written_bytes = 0
        """Into `shared`, by the last update."""

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        far = [engine for engine in engines if not engine.shares_memory]
        held = {engine.url: state for engine, state in zip(far, on_all(far, mirrored) if far else [], strict=True)}
        copy = self._ready_copy()
        base = copy.state
        behind = {url for url, state in held.items() if base is None or state != base}
        # a name of its own: no file system remembers anything else by it
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
                folder = Path(engine.ask_mirror(how, {"folder": str(source)})["folder"])
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
        """What engines have; empty before the first update, and after one that broke off in the middle."""
        if self._copy is None or self._copy.state is None:
            self.close()
            self._copy = WeightFolder(self._copies)
            for leftover in self._shared.glob("weights_*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        return self._copy


def mirrored(engine: WeightEngine) -> str | None:
    """The state of the weights that an engine's mirror has."""
    state = engine.ask_mirror("state", {})["state"]
    return None if state is None else str(state)


class _PatchWriter:
    """The files of one update: a file a bucket, what they do at last."""

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
        """Returns the bytes that were written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(base, state, digests(self._forms), self._forms)
        return self._bytes + manifest.write(self.folder)
