"""Links, anchors and file names in README, docs/ and the examples' pages lead somewhere. Other hosts are not asked."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")],
    key=lambda page: str(page.relative_to(ROOT)),
)
FENCE = re.compile(r"^( *)(```+)[^`\n]*\n.*?^\1\2\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
NAME = re.compile(r"`((?:[\w.-]+/)+[\w*.-]*)`")
TOP = ("owpo_megatron/", "tests/", "tools/", "examples/", "docs/", "requirements/", ".ci/")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text())


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).strip()
        found.add(re.sub(r"[ ]", "-", plain))
    return found


def broken_links(page: Path) -> list[str]:
    out = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(posixpath.normpath(page.parent / path)) if path else page
        if not target.exists():
            out.append(f"{link}: no such file")
        elif anchor and anchor not in slugs(target):
            out.append(f"{link}: no such heading")
    return out


def stale_names(page: Path) -> list[str]:
    """Names of the repository's files and folders in backticks that lead nowhere, e.g. `tests/old/test_x.py`."""
    out = []
    for name in NAME.findall(prose(page)):
        is_code = name.endswith(".py") and (ROOT / "owpo_megatron" / name.split("/")[0]).is_dir()
        if not name.startswith(TOP) and not is_code:
            continue
        places = (ROOT, ROOT / "owpo_megatron", page.parent)
        if not any(any(place.glob(name.rstrip("/"))) for place in places):
            out.append(name)
    return [*out, *stale_pages(prose(page))]


def stale_pages(text: str) -> list[str]:
    """Names of documents in running text, e.g. `docs/old.md`, that do not exist."""
    return [name for name in re.findall(r"docs/[\w/]+\.md", text) if not (ROOT / name).exists()]


def test_docstrings_name_documents_that_exist() -> None:
    found = [f"{file.relative_to(ROOT)}: {name}" for file in sorted(ROOT.glob("owpo_megatron/**/*.py"))
             for name in stale_pages(file.read_text())]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of(page: Path) -> None:
    assert broken_links(page) == []
    assert stale_names(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](none.md) [y](#a-b) [z](#none) `tests/none/test_none.py` `tests/project/test_links.py`")
    assert broken_links(page) == ["none.md: no such file", "#none: no such heading"]
    assert stale_names(page) == ["tests/none/test_none.py"]


def test_the_site_lists_every_page() -> None:
    """A new page of docs/ needs its place in mkdocs.yml."""

    def pages(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        return [page for child in children for page in pages(child)]  # type: ignore[union-attr]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}
    examples = {f"examples/{page.parent.name}.md" for page in PAGES if ROOT / "examples" in page.parents}
    assert written | examples <= set(listed)


def test_the_rooms_page_has_every_room() -> None:
    page = (ROOT / "docs" / "rooms.md").read_text()
    rows = [row.split("|")[2] for row in page.splitlines() if row.startswith("| ") and row[2] in "012345-"]
    rooms = {path.name for path in (ROOT / "owpo_megatron").iterdir() if any(path.rglob("*.py"))}
    assert {name.strip().strip("`/") for row in rows for name in row.split(",")} == rooms | {
        "types",
        "errors",
        "carried",
        "launched",
        "hub",
    }
