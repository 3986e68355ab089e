"""Code blocks of the documents, and the comment in front of each that states what the tests do with it.

    <!-- run -->                  a bash or python block: the tests run it, in one folder with the page's earlier blocks
    <!-- run: quickstart -->      the same, with what it needs made first (the fixtures of test_code_blocks.py)
    <!-- not run: REASON -->      a bash, python or yaml block that the tests leave alone
    <!-- file: NAME -->           a file that later blocks use; a yaml file is also a run's configuration

A yaml block without a comment is a run's configuration, or sections of one, and must be valid. Blocks of other
languages (text, json, ini) need no comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>run|not run|file)(?:: (?P<about>[^\n]+?))? -->\n)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# What an indented block, which carries no comment, must not begin with.
COMMAND = re.compile(
    r"^    (?:\$ |sudo |\.venv/bin/|owpo |make |python3? |docker |pip |git |from \w+ import )", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    page: str  # path in the repository
    line: int
    language: str
    mark: str  # run, not run, file, or empty
    about: str  # what follows the mark's colon
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text()
    found = []
    for match in BLOCK.finditer(content):
        line = content.count("\n", 0, match.start("language")) + 1
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(
            Block(str(page.relative_to(ROOT)), line, match["language"], match["mark"] or "", match["about"] or "", text)
        )
    return found


ALL = [block for page in PAGES for block in blocks_of(page)]
