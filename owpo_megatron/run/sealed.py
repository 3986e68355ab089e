"""Folders that count as whole: a manifest with the hash of every file is written last, and checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from owpo_megatron.errors import printable
from owpo_megatron.run.files import put_in_place
from owpo_megatron.run.layout import MANIFEST


def seal(scratch: Path, folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add the manifest to a folder and rename it into place, where from then on it counts as whole.

    Args:
        known: hashes that were made when the files were written, by name; the others are made here.
    """
    files = sorted(file for file in scratch.rglob("*") if file.is_file())
    names = [str(file.relative_to(scratch)) for file in files]
    manifest = {name: known.get(name) or sha256_of(scratch / name) for name in names}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
    put_in_place(scratch, folder)


def fault_of(folder: Path) -> str | None:
    """The first thing that is wrong with a sealed folder, in a few words; None: every file has its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except ValueError:  # no JSON, no text
        return f"{MANIFEST} is cut short or overwritten"
    if not isinstance(manifest, dict) or not manifest:
        return f"{MANIFEST} lists no files"
    for name, sha in manifest.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{MANIFEST} names {name!r}, which is not in the folder"
        try:
            if not file.is_file():
                return f"{name} is missing"
            if sha256_of(file) != sha:
                return f"{name} has another content than when it was written"
        except OSError as error:  # also a name that is too long for one
            return f"{printable(name)[:80]} cannot be read: {error.strerror}"
    return None


def verify_manifest(folder: Path) -> bool:
    """True when every file of the manifest is there with its hash."""
    return fault_of(folder) is None


def bytes_in(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sha256_of(path: str | Path) -> str:
    """The hash of a file's content."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
