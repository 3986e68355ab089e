"""docs/paper.md: the places in the code, the fields and the items of the paper that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from owpo_megatron.config import Config
from owpo_megatron.methods import catalogue, hyper_parameters
from owpo_megatron.report.published import errata
from owpo_megatron.reproduce.artefacts import ARTEFACTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))
FIELDS = sorted(set(re.findall(r"`([a-z]+\.[a-z_0-9]+)(?::[^`]*)?`", PAGE)) - {"ablation.yaml", "sensitivity.yaml"})


def definitions(file: Path) -> set[str]:
    """Names defined at the top of a module, and its classes' methods as CLASS.METHOD."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("file", "symbol"), PLACES, ids=lambda part: part)
def test_every_place_exists(file: str, symbol: str) -> None:
    path = ROOT / file if file.startswith("tests/") else ROOT / "owpo_megatron" / file
    assert path.is_file() and symbol in definitions(path)


@pytest.mark.parametrize("dotted", FIELDS)
def test_every_field_exists(dotted: str) -> None:
    section, name = dotted.split(".")
    fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    own = (
        {one for method in catalogue().values() for one in hyper_parameters(method)}
        if section == "algorithm"
        else set()
    )
    assert name in fields or name in own


def test_the_page_has_every_item_of_the_paper() -> None:
    """Eq. 11 to 31 are the appendix's proofs of the lemma, the proposition and the corollary."""
    for number in range(1, 11):
        assert re.search(rf"Eq\. (?:\d+ and )?{number}\b", PAGE), number
    for item in (
        "Lemma 4.1",
        "Proposition 4.2",
        "Corollary 4.3",
        "Algorithm 1",
        "Section 5.3",
        "Section 5.4",
        "Table 1",
    ):
        assert item in PAGE or item.replace("Table 1", "Tables 1") in PAGE
    for name in ARTEFACTS:
        assert f"`{name}`" in PAGE
    assert len(PLACES) > 25 and len(FIELDS) > 25


def test_the_page_has_the_errata_of_the_data_file() -> None:
    page = " ".join(PAGE.split())
    for text in errata():
        assert text in page
