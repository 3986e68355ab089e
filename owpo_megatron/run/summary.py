"""summary.json: what a finished run came to, read off its metrics.jsonl."""

from __future__ import annotations

import json
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.run.files import write_whole
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.run.metrics import lines_in
from owpo_megatron.types import Candidate, ReferenceVersion


def write_summary(
    config: Config, engine: dict[str, Any], reference: ReferenceVersion, swaps: int, best: Candidate | None
) -> dict[str, Any]:
    """Write and return the summary; an evaluation that was not made leaves its fields out."""
    lines = lines_in(RunFolder.of(config).metrics)
    evals = {line["step"]: line["eval"] for line in lines if "eval" in line}
    steps = [line for line in lines if "seconds" in line]
    summary: dict[str, Any] = {"name": config.name, "algorithm": config.algorithm.name, "steps": config.optimizer.steps}
    for when, step in (("before", 0), ("after", config.optimizer.steps)):
        for name, value in evals.get(step, {}).items():
            if "pass@" in name:
                summary[f"{name.replace('@', '_at_')}_{when}"] = value
    summary |= {
        "steps_updated": sum(bool(line.get("updates")) for line in steps),
        "swaps": swaps,
        "reference": {"ref_id": reference.ref_id, "source_step": reference.source_step, "reason": reference.reason},
        "best": {"step": best.step, "pass@1": best.score} if best else None,
        "parallel": {name: getattr(config.parallel, name) for name in ("tp", "cp", "pp", "dp", "sp")},
        "engine": engine,
        "seconds": round(sum(line["seconds"]["total"] for line in steps), 2),
        "tokens": sum(int(line.get("tokens", 0)) for line in steps),
        "mismatch_max": max((line["mismatch"] for line in steps if "mismatch" in line), default=None),
    }
    write_whole(RunFolder.of(config).summary, json.dumps(summary, indent=1) + "\n", durable=True)
    return summary
