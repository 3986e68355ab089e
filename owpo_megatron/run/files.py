"""Files and folders that appear whole or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """A scratch file to write, which replaces `path` in one rename when the block ends without an error.

    Args:
        path: its folder is made where it does not exist.
        durable: flush the content to the disk before the rename; a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        if durable:
            flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Replace a file's content in one go; see `whole_file`."""
    with whole_file(path, durable) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def put_in_place(scratch: Path, folder: Path) -> None:
    """Give a finished folder its final name, with everything in it on the disk first.

    An existing folder of that name is replaced; between two renames it is briefly absent.
    """
    for entry in scratch.rglob("*"):
        if not entry.is_symlink():
            flush(entry)
    flush(scratch)
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, old)
    os.replace(scratch, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: Path) -> int | None:
    """The descriptor of an exclusive lock on this file, None where another holds it.

    The lock ends when the descriptor is closed here and in every process that inherited it, however they end.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """`take_lock` for the length of a block."""
    descriptor = take_lock(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
