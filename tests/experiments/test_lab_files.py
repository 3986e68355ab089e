"""The comparisons of examples/cpu-lab name every method of the catalogue, and each of their rows was run."""

from __future__ import annotations

from pathlib import Path

from owpo_megatron.config.file import read_mapping
from owpo_megatron.experiments.lab import Lab
from owpo_megatron.methods import catalogue

ROOT = Path(__file__).parents[2]
FILES = sorted(file for file in (ROOT / "examples" / "cpu-lab").glob("*.yaml") if "methods" in read_mapping(file))
CATALOGUE = [file for file in FILES if file.stem.startswith("zoo") or file.stem == "plans"]


def test_every_method_is_in_a_comparison() -> None:
    known = {name for name, method in catalogue().items() if method.__module__.startswith("owpo_megatron.")}
    named = {arm.method for file in FILES for arm in Lab.load(file).methods}
    assert known - named == set(), "name it in a file of examples/cpu-lab, and run that"
    assert len(known) >= 76


def test_every_row_of_the_catalogue_was_run() -> None:
    page = (ROOT / "docs" / "lab.md").read_text()
    labels = {arm.label for file in CATALOGUE for arm in Lab.load(file).methods}
    missing = {label for label in labels if f"| `{label}` |" not in page}
    assert missing == set(), "owpo compare -c the file that names it, then tools/document_lab_methods.py"
