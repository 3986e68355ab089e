#!/usr/bin/env python3
"""Write the tables of docs/methods.md from what the methods declare: all of them, and their hyper-parameters.

.venv/bin/python tools/document_methods.py         # a test fails while the page is out of date
"""

from __future__ import annotations

from pathlib import Path

from owpo_megatron.methods import Method, catalogue, hyper_parameters

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- from the catalogue: begin -->", "<!-- from the catalogue: end -->"
GROUPS = {"mixed": "unequal verdicts", "all": "all"}


def page(text: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    built_in = [method for method in catalogue().values() if method.__module__.startswith("owpo_megatron.")]
    return f"{before}{BEGIN}\n{methods_table(built_in)}\n{hyper_table(built_in)}{END}{after}"


def methods_table(methods: list[type[Method]]) -> str:
    rows = [
        "| `algorithm.name` | maximised, per token | paper | divided by | coupling | groups | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        reference = method.reference if method.reference == "none" else f"{method.reference}, {method.refresh}"
        cells = (method.summary, method.paper, method.divisor, method.coupling, GROUPS[method.groups], reference)
        rows.append(f"| `{method.name}` | {' | '.join(cells)} |")
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
    print(f"written: {PAGE}")
