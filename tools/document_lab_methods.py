#!/usr/bin/env python3
"""Write the table of all methods into docs/lab.md, from the results of the two comparisons of examples/cpu-lab.

owpo compare -c examples/cpu-lab/zoo.yaml && owpo compare -c examples/cpu-lab/zoo_advantages.yaml
.venv/bin/python tools/document_lab_methods.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lab.md"
BEGIN, END = "<!-- all methods: begin -->", "<!-- all methods: end -->"
COMPARISONS = ("cipher-zoo", "cipher-zoo-advantages")


def page(text: str, runs: Path) -> str:
    """The page with the tables as the results have them."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{''.join(table(runs / name) for name in COMPARISONS)}{END}{after}"


def table(folder: Path) -> str:
    result = json.loads((folder / "table.json").read_text())
    (regime,) = result["regimes"].values()
    rows = [
        f"\n{result['steps']} steps; base {regime['base']:.3f}:\n",
        "| method | final Pass@1 | AUC | token passes | seconds of its steps |",
        "|---|---|---|---|---|",
    ]
    for entry in regime["entries"]:
        final, auc, passes = (entry[name]["mean"] for name in ("final", "auc", "total_token_passes"))
        seconds = sum(line["seconds"]["total"] for line in steps(folder, entry["label"]))
        rows.append(f"| `{entry['label']}` | {final:.3f} | {auc:.3f} | {passes / 1000:.0f} k | {seconds:.0f} |")
    return "\n".join(rows) + "\n\n"


def steps(folder: Path, label: str) -> Iterator[dict[str, Any]]:
    """The lines of finished steps of a method's one run."""
    for text in next((folder / "runs").glob(f"plain-{label}-s1-*/metrics.jsonl")).read_text().splitlines():
        line = json.loads(text)
        if "seconds" in line:
            yield line


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), ROOT / "runs"))
    print(f"written: {PAGE}")
