#!/usr/bin/env python3
"""Count from git what each model family has taken: the commit that brought it, its files and lines in the package.

A family is in the package since the commit that added its line to the table of families/catalogue.py. Counted are the
files of owpo_megatron/ that this commit touched, and the lines that it added and removed there; one that brought
several families is counted for all of them together. Tests and documents are not counted.

.venv/bin/python tools/family_size.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "owpo_megatron"
CATALOGUE = f"{PACKAGE}/families/catalogue.py"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit_of(model_type: str) -> str:
    """The first commit whose catalogue has the family."""
    return git("log", "--format=%h", f'-S"{model_type}": (', "--", CATALOGUE).splitlines()[-1]


def size_of(commit: str) -> tuple[int, int, int]:
    """(files, lines added, lines removed) in the package."""
    rows = [line.split("\t") for line in git("show", "--numstat", "--format=", commit, "--", PACKAGE).splitlines()]
    counted = [(int(added), int(removed)) for added, removed, _ in rows if added != "-"]
    return len(counted), sum(added for added, _ in counted), sum(removed for _, removed in counted)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from owpo_megatron.families.catalogue import MODEL_TYPES

    brought: dict[str, list[str]] = {}
    for model_type in MODEL_TYPES:
        brought.setdefault(commit_of(model_type), []).append(model_type)
    print("| families of one commit | own files, lines today | files touched | lines added | removed |")
    print("|---|---|---|---|---|")
    for commit, types in brought.items():
        modules = dict.fromkeys(MODEL_TYPES[model_type][0] for model_type in types)
        files = [(name, (ROOT / PACKAGE / "families" / f"{name}.py").read_text().count("\n")) for name in modules]
        own = ", ".join(f"`{name}.py` {lines}" for name, lines in files)
        touched, added, removed = size_of(commit)
        print(f"| {', '.join(types)} | {own} | {touched} | {added} | {removed} |")


if __name__ == "__main__":
    main()
