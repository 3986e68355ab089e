#!/usr/bin/env python3
"""Write the tables of docs/kernel.md with errors of the FP8 head, of every method.

    .venv/bin/python tools/head_error_table.py --out synthetic.md
    .venv/bin/python tools/head_error_table.py --random-model --out random.md
    .venv/bin/python tools/head_error_table.py --model cache/quickstart/cipher --out quickstart.md
    .venv/bin/python tools/document_head_errors.py synthetic.md random.md quickstart.md

Methods with the same figures share a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernel.md"
NAMES = ("random 0.5 B", "quickstart's")


def tables(text: str) -> list[dict[str, list[str]]]:
    """[distributions, methods] of one file of head_error_table.py: cells by the first one."""
    found: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("| distribution", "| method")):
            found.append({})
        elif line.startswith("| "):
            found[-1][cells[0]] = cells[1:]
    return found


def grouped(methods: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """(names, cells) in the order of the first name."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, cells in methods.items():
        rows.setdefault(tuple(cells), []).append(name)
    return [(", ".join(names), list(cells)) for cells, names in rows.items()]


def of_synthetic(text: str) -> str:
    cases, methods = tables(text)
    lines = ["| distribution | mean abs error of logp | p99 | tokens whose w changes its side |", "|-|-|-|-|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in cases.items()]
    lines += [f"\n{len(methods)} methods:\n", "| methods | 1 - cosine of dh | of dW | norm of dh off by | of dW |"]
    return "\n".join([*lines, "|-|-|-|-|-|", *(f"| {name} | {' | '.join(row)} |" for name, row in grouped(methods))])


def of_models(files: list[str]) -> str:
    both = [tables(text) for text in files]
    lines = ["| model, distribution | mean abs error of logp | p99 | tokens whose w changes its side |", "|-|-|-|-|"]
    lines += [
        f"| {name}, {case} | {' | '.join(cells)} |"
        for name, (cases, _) in zip(NAMES, both, strict=True)
        for case, cells in cases.items()
    ]
    assert both[0][1].keys() == both[1][1].keys(), "the two files have the same methods"
    joined = {name: cells + both[1][1][name] for name, cells in both[0][1].items()}
    lines += [
        f"\n{len(joined)} methods, the worse of both temperatures:\n",
        "| methods |" + "".join(f" {name}: 1 - cosine of dh | of dW | norm of dh off by | of dW |" for name in NAMES),
        "|-|-|-|-|-|-|-|-|-|",
    ]
    lines += [f"| {names} | {' | '.join(cells)} |" for names, cells in grouped(joined)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=3, type=Path, metavar="FILE", help="synthetic, random model, quickstart's")
    synthetic, *models = (file.read_text() for file in parser.parse_args().files)
    page = PAGE.read_text()
    for name, text in (("synthetic head errors", of_synthetic(synthetic)), ("head errors", of_models(models))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        assert found, f"no {begin} in {PAGE}"
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
