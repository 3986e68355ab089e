#!/usr/bin/env python3
"""Write docs/formulas.md, and the tables of docs/methods.md, from what the methods declare.

.venv/bin/python tools/document_methods.py         # a test fails while the page is out of date
"""

from __future__ import annotations

import inspect
from pathlib import Path

from owpo_megatron.methods import Method, catalogue, hyper_parameters

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
FORMULAS = PAGE.with_name("formulas.md")
BEGIN, END = "<!-- from the catalogue: begin -->", "<!-- from the catalogue: end -->"
INTRODUCTION = """\
# Formulas

Every method of the catalogue as its file states it, written by `tools/document_methods.py`. [Methods](methods.md)
explains the symbols, the divisors and the couplings; `owpo methods` prints settings and papers.
"""
KINDS = {
    "objective": "Objectives: the value of a token",
    "advantage": "Advantages: what a reward becomes",
    "sampling": "Sampling: which responses are drawn",
}
GROUPS = {"mixed": "unequal verdicts", "all": "all"}


def page(text: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{methods_table(built_in())}\n{hyper_table(built_in())}{END}{after}"


def built_in() -> list[type[Method]]:
    return [method for method in catalogue().values() if method.__module__.startswith("owpo_megatron.")]


def formulas() -> str:
    """Text of docs/formulas.md: name, paper, summary and docstring of every method."""
    parts = [INTRODUCTION]
    for kind, title in KINDS.items():
        methods = [method for method in built_in() if method.kind == kind]
        parts += [f"## {title}\n"] if methods else []
        for method in methods:
            about = inspect.cleandoc(vars(method).get("__doc__") or "")
            parts.append(f"### `{method.name}`\n\n{method.paper}. Maximised: {method.summary}\n\n{about}\n")
    return "\n".join(parts)


def methods_table(methods: list[type[Method]]) -> str:
    rows = [
        "| `algorithm.name` | kind | maximised, per token | paper | divided by | coupling | groups | reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        reference = method.reference if method.reference == "none" else f"{method.reference}, {method.refresh}"
        cells = (method.kind, method.summary, method.paper, method.divisor, method.coupling, GROUPS[method.groups])
        rows.append(f"| `{method.name}` | {' | '.join(cells)} | {reference} |")
    return "\n".join(rows) + "\n"


def hyper_table(methods: list[type[Method]]) -> str:
    """One row per name, bounds and meaning; methods that share them share the row, with each default's methods."""
    found: dict[tuple[str, str, str], dict[object, list[str]]] = {}
    for method in methods:
        for one in hyper_parameters(method).values():
            of = found.setdefault((one.name, one.bounds, one.help), {})
            of.setdefault(one.default, []).append(method.name)
    rows = ["| `algorithm.` | value | default | meaning |", "|---|---|---|---|"]
    for (name, bounds, help), of in sorted(found.items()):
        defaults = "; ".join(f"{default} ({', '.join(names)})" for default, names in of.items())
        rows.append(f"| `{name}` | {bounds} | {defaults} | {help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    FORMULAS.write_text(formulas())
    print(f"written: {PAGE}, {FORMULAS}")
