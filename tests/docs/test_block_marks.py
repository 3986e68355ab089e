"""Every code block of the documents states what the tests do with it, and those that are configurations are valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from code_blocks import ALL, COMMAND, PAGES, ROOT, Block, blocks_of

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def check_configuration(raw: dict[str, Any]) -> None:
    """Raise UserError where a mapping is not a run's configuration; sections that a fragment lacks are filled in."""
    raw = {name: value for name, value in raw.items() if name != "include"}
    minimal: dict[str, dict[str, Any]] = {"model": {"path": "model"}, "data": {"source": "task:cipher"}}
    if "sources" in raw.get("data", {}):
        del minimal["data"]
    for name, section in minimal.items():
        raw[name] = section | raw.get(name, {})
    Config.build(raw)


@pytest.mark.parametrize("block", [block for block in ALL if block.language in ("bash", "python")], ids=str)
def test_every_program_is_run_or_says_why_not(block: Block) -> None:
    assert block.mark in ("run", "not run", "file"), (
        "put <!-- run --> or <!-- not run: REASON --> on the line before it"
    )
    assert block.mark == "run" or block.about, "give the reason: <!-- not run: REASON -->"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "yaml" and b.mark != "not run"], ids=str)
def test_every_configuration_is_valid(block: Block) -> None:
    check_configuration(yaml.safe_load(block.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_are_in_fenced_blocks(page: Path) -> None:
    """An indented block has no place for a mark; it is for formulae and output."""
    content = page.read_text()
    for block in blocks_of(page):
        content = content.replace(block.text, "")
    assert COMMAND.findall(content) == []


def test_a_wrong_configuration_is_seen() -> None:
    with pytest.raises(UserError, match="unknown field"):
        check_configuration({"optimizer": {"learning_rate": 1}})


def test_marks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- not run: no GPU -->\n```bash\nowpo x\n```\n\n```yaml\na: 1\n```\n")
    monkeypatch.setattr("code_blocks.ROOT", tmp_path)
    first, second = blocks_of(page)
    assert (first.language, first.mark, first.about, first.text) == ("bash", "not run", "no GPU", "owpo x\n")
    assert (second.language, second.mark, second.line) == ("yaml", "", 8)
