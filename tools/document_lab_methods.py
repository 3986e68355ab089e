#!/usr/bin/env python3
"""Write the tables of all methods into docs/lab.md, from the results of the comparisons of examples/cpu-lab.

for name in zoo zoo_advantages plans zoo_reasoning zoo_turns; do owpo compare -c examples/cpu-lab/$name.yaml; done
.venv/bin/python tools/document_lab_methods.py

A comparison without results here keeps its table, and a table the rows of methods that were not run again:
`methods=[rover,lp_reg]` on the command line of a comparison adds two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lab.md"
COMPARISONS = ("cipher-zoo", "cipher-zoo-advantages", "cipher-plans", "sums-zoo", "lookup-zoo")


def page(text: str, runs: Path) -> str:
    """The page with the tables as the results have them."""
    for name in COMPARISONS:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if (runs / name / "table.json").is_file():
            before, _, rest = text.partition(begin)
            present, _, after = rest.partition(end)
            text = f"{before}{begin}\n{merged(present, table(runs / name))}{end}{after}"
    return text


def merged(present: str, new: str) -> str:
    """The new table, with the rows of the present one whose methods it lacks, in their places; others at the end.

    A present table of other columns (of a run that kept less) keeps its rows with the cells that it has.
    """
    rows = {line.split("`")[1]: line for line in new.splitlines() if line.startswith("| `")}
    columns = next(line for line in new.splitlines() if line.startswith("| method")).count("|") - 1
    kept: dict[str, str] = {}
    for line in present.splitlines():
        if line.startswith("| `"):
            cells = line.strip().strip("|").split("|")
            cells += [" - "] * (columns - len(cells))
            kept[line.split("`")[1]] = f"|{'|'.join(cells)}|"
    head = [line for line in new.splitlines() if not line.startswith("| `") and line]
    title, *rest = head
    lines = [*{**kept, **rows}.values()]
    return "\n".join(["", title, "", *rest, *lines]) + "\n\n"


def table(folder: Path) -> str:
    result = json.loads((folder / "table.json").read_text())
    (regime,) = result["regimes"].values()
    rows = [
        f"\n{result['steps']} steps; base {regime['base']:.3f}:\n",
        "| method | final Pass@1 | AUC | token passes | seconds of its steps |",
        "|---|---|---|---|---|",
    ]
    for entry in regime["entries"]:
        final, auc = (entry[name]["mean"] for name in ("final", "auc"))
        passes = entry["total_token_passes"]  # None while its longer run for equal compute is not finished
        in_thousands = f"{passes['mean'] / 1000:.0f} k" if passes else "-"
        seconds = sum(line["seconds"]["total"] for line in steps(folder, entry["label"]))
        rows.append(f"| `{entry['label']}` | {final:.3f} | {auc:.3f} | {in_thousands} | {seconds:.0f} |")
    return "\n".join(rows) + "\n\n"


def steps(folder: Path, label: str) -> Iterator[dict[str, Any]]:
    """The lines of finished steps of a method's one run."""
    for text in next((folder / "runs").glob(f"*-{label}-s1-*/metrics.jsonl")).read_text().splitlines():
        line = json.loads(text)
        if "seconds" in line:
            yield line


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), ROOT / "runs"))
    print(f"written: {PAGE}")
