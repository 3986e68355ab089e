"""Model weights as safetensors files that are memory-mapped and patched in place, and updates to such a folder.

An update is a folder too: patches, or all weights, with an `update.json` that names its base and its final state.

    weights      model-00001.safetensors ... model.safetensors.index.json, update.json
    patches      changes-00001.safetensors ..., update.json

A state is the SHA-256 of all tensors' names and SHA-256s. A patch is applied only to the state that it was made from,
and the result is hashed again; a folder has no state from the first write until that verification.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.sync.bucket import Bucket
from owpo_megatron.sync.delta.encoding import Bits, Form, Patch, apply, bits_of, difference
from owpo_megatron.sync.delta.private_folder import PrivateFolder

MANIFEST = "update.json"
_PATCH_FILES, _WEIGHT_FILES = "changes-*.safetensors", "model-*.safetensors"
_SHOWN = 5  # names in a message
_MOST_THREADS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Manifest:
    """Description of an update; its digests are the SHA-256, after the update, of every tensor that it changes."""

    base: str | None  # state that it applies to; None: it contains all weights
    state: str  # state after it
    digests: dict[str, str]  # by tensor name
    forms: dict[str, Form]  # of patches, by tensor name

    def write(self, folder: Path) -> int:
        """Write the manifest; return its bytes."""
        return (folder / MANIFEST).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        return cls(**json.loads((folder / MANIFEST).read_text()))


class WeightFolder:
    """Weights in a folder private to this process. Not thread-safe.

    Args:
        parent: folder to create it in, on a tmpfs or a local disk.

    Raises:
        UserError: it cannot be created there.
    """

    def __init__(self, parent: Path):
        self._parent = parent
        try:
            self._private = PrivateFolder(parent)
        except OSError as error:
            remedy = f"cannot hold a copy of the weights ({error.strerror}); name a folder on a tmpfs or a local disk"
            raise UserError("sync.mirror", parent, remedy) from error
        self._arrays: dict[str, Bits] = {}  # flat memory maps of the files
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self.state: str | None = None
        """None while the content is not verified to be the weights of a version."""

    @property
    def path(self) -> Path:
        return self._private.path

    def close(self) -> None:
        """Remove the folder."""
        self.state = None
        self._arrays = {}
        self._private.close()

    # ------------------------------------------------------------------------------------------ the trainer's side
    def add(self, bucket: Bucket) -> None:
        """Write new tensors, as one more file."""
        self._check_space(sum(tensor.nbytes for _, tensor in bucket))
        file = self.path / f"model-{len(set(self._file_of.values())) + 1:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in bucket}, file)
        self._open(file)
        self._digest(name for name, _ in bucket)

    def replace(self, bucket: Bucket) -> dict[str, Patch]:
        """Overwrite existing tensors; return the patches of those that changed.

        Raises:
            EngineError: a tensor does not exist, or has another shape or element size.
        """
        self.state = None

        def one(named: tuple[str, torch.Tensor]) -> tuple[str, Patch | None]:
            name, tensor = named
            new, old = bits_of(tensor), self._arrays.get(name)
            if old is None or self._shapes[name] != tuple(tensor.shape) or old.nbytes != new.nbytes:
                raise EngineError(f"{name} differs in shape or dtype from the last update; the next sends all weights")
            patch = difference(old, new)
            if patch is not None:
                apply(patch, old)
                self._digests[name] = _hash(old)
            return name, patch

        return {name: patch for name, patch in on_cores(one, bucket) if patch is not None}

    def seal(self) -> str:
        """Write index and manifest once all weights are in place; return their state."""
        self.state = _state(self._digests)
        size = sum(array.nbytes for array in self._arrays.values())
        index = {"metadata": {"total_size": size}, "weight_map": self._file_of}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        Manifest(None, self.state, self._digests, {}).write(self.path)
        return self.state

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self._digests[name] for name in names}

    # ------------------------------------------------------------------------------------------ the engine's side
    def fill(self, source: Path) -> None:
        """Copy all weights of an update into this new folder and verify them.

        Raises:
            UserError: there is not enough space.
            EngineError: they do not match the manifest.
        """
        manifest = Manifest.read(source)
        if manifest.base is not None:
            raise EngineError(f"{source} contains changes, not all weights")
        files = sorted(source.glob(_WEIGHT_FILES))
        self._check_space(sum(file.stat().st_size for file in files))
        for file in files:
            shutil.copyfile(file, self.path / file.name)
            self._open(self.path / file.name)
        self._verify(manifest, self._arrays)
        self.seal()

    def patch(self, source: Path) -> None:
        """Apply an update's patches in place and verify the result.

        Raises:
            EngineError: they belong to another state (nothing was changed), or the result does not match the manifest
                (this folder then has no state).
        """
        manifest = Manifest.read(source)
        if self.state is None or manifest.base != self.state:
            here = f"state {self.state[:12]}" if self.state else "no complete weights"
            raise EngineError(f"{source} patches state {str(manifest.base)[:12]}, but this folder holds {here}")
        self.state = None
        for file in sorted(source.glob(_PATCH_FILES)):
            with safe_open(file, "np") as opened:
                names = [key.removesuffix("#values") for key in opened.keys() if key.endswith("#values")]  # noqa: SIM118
                for name in names:
                    where = opened.get_tensor(f"{name}#where")
                    patch = Patch(manifest.forms[name], where, opened.get_tensor(f"{name}#values"))
                    try:
                        apply(patch, self._arrays[name])
                    except (ValueError, IndexError, KeyError) as error:
                        raise EngineError(f"{source} does not fit {name}: {error}") from error
        self._verify(manifest, manifest.digests)
        self.seal()

    # ------------------------------------------------------------------------------------------
    def _open(self, file: Path) -> None:
        for name, shape, bits in _mapped(file):
            self._arrays[name], self._shapes[name], self._file_of[name] = bits, shape, file.name

    def _digest(self, names: Iterable[str]) -> None:
        def one(name: str) -> tuple[str, str]:
            return name, _hash(self._arrays[name])

        self._digests.update(on_cores(one, names))

    def _verify(self, manifest: Manifest, names: Iterable[str]) -> None:
        """Hash the content again and compare it with the manifest."""
        self._digest(names)
        wrong = [name for name in manifest.digests if self._digests.get(name) != manifest.digests[name]]
        if wrong or _state(self._digests) != manifest.state:
            shown = ", ".join(wrong[:_SHOWN]) or "a tensor that the update does not name"
            raise EngineError(f"after the update {len(wrong)} tensors differ from what was sent: {shown}")

    def _check_space(self, size: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < size:
            remedy = f"has {free >> 20} MB free, and the next weights need {size >> 20} MB; "
            remedy += "enlarge it (docker run --shm-size) or name a folder on a local disk"
            raise UserError("sync.mirror", self._parent, remedy)


def write_patches(patches: Mapping[str, Patch], file: Path) -> int:
    """Write patches as safetensors; return the size of the file in bytes."""
    arrays = {f"{name}#values": patch.values for name, patch in patches.items()}
    save_arrays(arrays | {f"{name}#where": patch.where for name, patch in patches.items()}, file)
    return file.stat().st_size


def on_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map on one thread per core, at most 16: comparing, copying and hashing release the GIL."""
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(function, items))


def _hash(bits: Bits) -> str:
    return hashlib.sha256(bits.data).hexdigest()


def _state(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _mapped(file: Path) -> Iterator[tuple[str, tuple[int, ...], Bits]]:
    """Yield (name, shape, [N] bits) of a safetensors file; writing to the bits changes the file."""
    content = np.asarray(np.memmap(file, np.uint8, "r+"))
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")  # length of the header, header, tensors
    for name, entry in json.loads(content[8:start].tobytes()).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            bits, count = content[start + begin : start + end], math.prod(entry["shape"])
            yield name, tuple(entry["shape"]), bits.view(f"u{(end - begin) // count}") if count else bits
