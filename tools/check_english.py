#!/usr/bin/env python3
"""Check the mechanical part of the house style for English: docstrings, comments, messages, help texts, documents.

    tools/check_english.py [PATH ...]     # files or folders; without one, all of COVERED

Prints `file:line: rule: text` for every breach and exits with status 1 when there is one. Standard library only.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Files and folders that follow the rules.
COVERED = ["README.md", "CONTRIBUTING.md", "docs", "examples", "owpo_megatron", "tests", "tools", "setup.py"]
# Wordings that the rules would refuse, as data of the checker and of its test.
EXEMPT = ["tools/check_english.py", "tests/project/test_english.py"]
SUFFIXES = {".py", ".md", ".sh", ".yaml", ".yml", ".toml"}

_COUNTED = (
    r"\d(?:[\d.,]*\d)?|[kMG]i?B|bytes?|rows|tokens|samples|once|twice|ms|s|seconds?|minutes|values|floats|lines|files"
    r"|figures|GPUs|(?:an?|one|two|three|four|several|few) (?!on |in |of |for |with |as )\w+|one"
)
_PER = (
    r"step|second|minute|hour|day|token|rank|sample|group|prompt|problem|update|chunk|layer|line|file|engine|GPU|node"
    r"|core|tensor|parameter|weight|post|request|call|run|task|seed|method|set|bucket|microbatch|response|row|element"
    r"|answer|expert|head|verification|server|machine|process|batch|round|model|teacher|job|pass|sequence|string"
)
_AFTER_RATE = r"(?=\s*$|[.,;:()\]|`*]|\s+(?:and|or|of|in|on|at|for|with|by|from|to|as|is|are|against|over|than|but)\b)"


@dataclass(frozen=True)
class Rule:
    name: str
    pattern: re.Pattern[str]
    remedy: str


RULES = [
    Rule("of", re.compile(r"(?:^|[.?!] |: )Of (?=\w)"), "start with a noun or a verb"),
    Rule("of", re.compile(r"^\w+: of (?:the|an?|its|each|every|this|all|that)\b"), "name the thing itself"),
    Rule("tell", re.compile(r"\b(?:tells?|told)\b(?! apart)", re.IGNORECASE), "log, return, report, show"),
    Rule(
        "say",
        re.compile(r"(?<!paper )(?<!authors )\b(?:says?|said|saying)\b(?![,:])", re.IGNORECASE),
        "log, return, report, be, state",
    ),
    Rule("stand", re.compile(r"\b(?:stands?|stood)\b(?! for\b| in for\b)", re.IGNORECASE), "is, lies, exists"),
    Rule("speak", re.compile(r"\b(?:speaks?|spoken?)\b", re.IGNORECASE), "use, support"),
    Rule("goes by", re.compile(r"\b(?:goes|go) by (?:value|reference|name|the)\b", re.IGNORECASE), "is sent as"),
    Rule(
        "per",
        re.compile(rf"(?<![\w/-])(?:{_COUNTED}) an? (?:{_PER}){_AFTER_RATE}"),
        "write `per`",
    ),
]


# A docstring opens with a verb or a noun; "Whether" is left to predicates.
OPENING = Rule(
    "opening",
    re.compile(r"^(?:What|Where|Which|How|When|Who|From|As|By|In|On|At|To|With|Without|For|That|It|If)\b"),
    "open with a verb or a noun",
)


# Strings that are no prose: regular expressions, scripts.
_CODE = re.compile(r"\(\?|^\s*(?:import|from) \w", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """A piece of prose and the line it starts at."""

    line: int
    content: str
    docstring: bool = False  # of a module, a class or a function


def texts_of(path: Path) -> Iterator[Text]:
    """Yield the prose of a file: of code its comments and strings, of a document its lines outside code blocks."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(content)
    elif path.suffix == ".md":
        yield from _markdown(content)
    else:
        yield from _comments(
            (number, line.split("#", 1)[1]) for number, line in enumerate(content.splitlines(), 1) if "#" in line
        )


def breaches(text: Text) -> Iterator[tuple[int, Rule, str]]:
    """Yield (line, rule, the words found) for each breach of a rule."""
    for rule in RULES:
        for paragraph_line, paragraph in _paragraphs(text):
            for match in rule.pattern.finditer(paragraph):
                start = max(0, match.start() - 24)
                yield paragraph_line, rule, paragraph[start : match.end() + 24]
    if text.docstring and OPENING.pattern.search(text.content):
        yield text.line, OPENING, text.content[:48].splitlines()[0]


def _python(content: str) -> Iterator[Text]:
    comments = [
        (token.start[0], token.string.lstrip("#"))
        for token in tokenize.generate_tokens(io.StringIO(content).readline)
        if token.type == tokenize.COMMENT
    ]
    yield from _comments(iter(comments))
    tree = ast.parse(content)
    docstrings = {id(node) for node in map(_docstring, ast.walk(tree)) if node is not None}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield Text(node.lineno, "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            if id(node) in docstrings or (" " in node.value and not _CODE.search(node.value)):
                yield Text(node.lineno, node.value, id(node) in docstrings)


def _docstring(node: ast.AST) -> ast.Constant | None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            return first.value
    return None


def _markdown(content: str) -> Iterator[Text]:
    fenced = False
    block: list[str] = []
    start = 1
    for number, line in enumerate(content.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        if fence or not line.strip():
            if block:
                yield Text(start, "\n".join(block))
            block = []
        elif not fenced:
            if not block:
                start = number
            block.append(re.sub(r"`[^`]*`", "`code`", line))
        fenced ^= fence
    if block:
        yield Text(start, "\n".join(block))


def _comments(lines: Iterator[tuple[int, str]]) -> Iterator[Text]:
    """Join comments on consecutive lines."""
    block: list[str] = []
    start = last = 0
    for number, line in lines:
        if block and number != last + 1:
            yield Text(start, "\n".join(block))
            block = []
        if not block:
            start = number
        block.append(line.strip())
        last = number
    if block:
        yield Text(start, "\n".join(block))


def _paragraphs(text: Text) -> Iterator[tuple[int, str]]:
    """Unwrap lines, so that a rule sees a whole sentence; a list item, a heading or an argument starts a new one."""
    joined: list[str] = []
    start = text.line
    for offset, line in enumerate(text.content.splitlines()):
        stripped = line.strip()
        fresh = not stripped or re.match(r"(?:[-*|#>]|\d+\.) |\w+(?: \(.*?\))?: ", stripped) or stripped.startswith("|")
        if fresh and joined:
            yield start, " ".join(joined)
            joined = []
        if stripped:
            if not joined:
                start = text.line + offset
            joined.append(re.sub(r"^(?:[-*>] )+", "", stripped))
    if joined:
        yield start, " ".join(joined)


def files_below(names: list[str]) -> list[Path]:
    """List the files of the repository at or below these paths that have prose to check."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *names],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    exempt = {ROOT / name for name in EXEMPT}
    return [path for path in found if path.suffix in SUFFIXES and path.is_file() and path not in exempt]


def main(names: list[str]) -> int:
    count = 0
    for path in files_below(names or COVERED):
        found = sorted(
            ((line, rule.name, rule.remedy, words) for text in texts_of(path) for line, rule, words in breaches(text)),
        )
        for line, name, remedy, words in found:
            print(f"{path.relative_to(ROOT)}:{line}: {name}: ...{words}... ({remedy})")
        count += len(found)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
