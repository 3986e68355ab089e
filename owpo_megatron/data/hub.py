"""Data sets of the Hugging Face hub: `hub:OWNER/NAME[@REVISION][:FILES]`, read as the files that they consist of.

Only huggingface_hub is needed: the Parquet and JSON-lines files are downloaded once (to its cache, HF_HOME) and read
like local ones. Without a network a set that is in the cache is found there.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.errors import UserError
from owpo_megatron.hub import endpoint, snapshot

PREFIX = "hub:"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<files>.+))?")
_KINDS = (".parquet", ".jsonl")
_CONVERTED = "refs/convert/parquet"  # where the hub keeps Parquet copies of sets in other formats


@dataclass(frozen=True)
class HubName:
    """A parsed name.

    Example:
        >>> HubName.parse("hub:openai/gsm8k:main/test-*.parquet", "data.source")
        HubName(repo='openai/gsm8k', revision=None, files='main/test-*.parquet')
    """

    repo: str
    revision: str | None
    files: str | None  # a pattern of file names inside the repository

    @classmethod
    def parse(cls, source: str, field: str) -> HubName:
        """Raises UserError, naming `field`, where the name is not one."""
        match = _NAME.fullmatch(source.removeprefix(PREFIX))
        if match is None:
            raise UserError(field, source, "write hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME:FILES")
        return cls(**match.groupdict())


def hub_files(source: str, field: str = "data.source") -> list[Path]:
    """Local copies of a set's files, in the order of their names, downloaded where the cache lacks them.

    Without FILES: those whose name holds "train" where there are such, else all Parquet files, else all JSON lines.

    Raises:
        UserError: no such set or revision, no access, no such file, or the hub cannot be reached and the cache has
            nothing.
    """
    name = HubName.parse(source, field)
    found = _download(name, name.revision, source, field)
    if not found and name.revision is None:
        found = _download(name, _CONVERTED, source, field)
    if not found:
        wanted = f"no file matches {name.files}" if name.files else "it has no .parquet or .jsonl file"
        raise UserError(field, source, f"{wanted}; look at the set's files on the hub and name some with :FILES")
    return found


def _download(name: HubName, revision: str | None, source: str, field: str) -> list[Path]:
    patterns = [name.files] if name.files else [f"*{kind}" for kind in _KINDS]
    folder = snapshot(
        "dataset", name.repo, revision, patterns, field, source,
        f"no such data set at {endpoint()}",
        f"{endpoint()} cannot be reached and the cache has no copy; download the file on another machine and give "
        "its path",
    )  # fmt: skip
    if folder is None:
        if revision == _CONVERTED:
            return []
        raise UserError(field, source, f"has no revision {revision}")
    files = sorted(path for path in folder.rglob("*") if path.suffix in _KINDS and path.is_file())
    if name.files:
        return [path for path in files if fnmatch.fnmatch(str(path.relative_to(folder)), name.files)]
    for chosen in (
        [path for path in files if "train" in path.name],
        [path for path in files if path.suffix == ".parquet"],
        files,
    ):
        if chosen:
            return chosen
    return []
