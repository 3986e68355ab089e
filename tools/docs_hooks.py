"""Hooks of mkdocs (mkdocs.yml): pages and files outside docs/ become part of the site, and links follow them there.

The documents link to each other and to code as files of a checkout, so that they also work in an editor and on a code
host. README.md becomes the index, each example's README.md a page, a linked source file a plain file below source/. A
link to nothing stops the build.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> file of the checkout.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
    **{f"examples/{file.parent.name}.md": f"examples/{file.parent.name}/README.md"
       for file in sorted(ROOT.glob("examples/*/README.md"))},
}  # fmt: skip
PAGE_OF = {source: page for page, source in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of PAGES, and every source file that a page links to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    documents = {f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_uri not in PAGES}
    linked: set[str] = set()
    for document in sorted(documents | set(PAGE_OF)):
        for link in links((ROOT / document).read_text()):
            target = resolve(document, link.partition("#")[0])
            if target not in PAGE_OF and not target.startswith("docs/"):
                linked.add(target)
    for target in sorted(linked):
        path = ROOT / target
        if path.is_file():
            files.append(File.generated(config, f"source/{target}{_suffix(path)}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links from where the document lies in the checkout to where they are in the site."""
    document = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        path, sign, anchor = match.group().partition("#")
        if not path or is_outside(match.group()):
            return match.group()
        target = resolve(document, path)
        if not (ROOT / target).exists():
            raise PluginError(f"{document}: link to {match.group()}: no such file")
        if target in PAGE_OF:
            there = PAGE_OF[target]
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        elif (ROOT / target).is_file():
            there, anchor, sign = f"source/{target}{_suffix(ROOT / target)}", "", ""
        else:
            raise PluginError(f"{document}: link to {match.group()}: a folder has no page; link to a file in it")
        return posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".") + sign + anchor

    return outside_fences(markdown, lambda text: LINK.sub(rewrite, text))


def links(markdown: str) -> list[str]:
    """Relative links of a document, those inside code blocks left out."""
    found: list[str] = []
    outside_fences(markdown, lambda text: found.extend(LINK.findall(text)) or text)
    return [link for link in found if not is_outside(link) and not link.startswith("#")]


def outside_fences(markdown: str, change: Any) -> str:
    """Apply a function to the text between fenced code blocks."""
    out, end = [], 0
    for fence in FENCE.finditer(markdown):
        out += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*out, change(markdown[end:])])


def is_outside(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def resolve(document: str, path: str) -> str:
    """Path in the checkout of a link in a document, e.g. ("docs/a.md", "../README.md") -> "README.md"."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), path)) if path else document


def _suffix(path: Path) -> str:
    """A suffix that makes browsers show a source file instead of running or saving it."""
    return "" if path.suffix in (".png", ".svg", ".json", ".txt") else f"{os.extsep}txt"
