"""The model card of a run's result: what it was trained from, how, and the numbers of its evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from owpo_megatron import __version__
from owpo_megatron.report.scores import metric_title
from owpo_megatron.report.table import rows
from owpo_megatron.run.layout import RunFolder, step_name
from owpo_megatron.run.metrics_reader import RunMetrics

PAPER = "https://arxiv.org/abs/2605.22156"


def model_card(run: RunMetrics, repo: str, base_model: str | None = None) -> str:
    """Markdown with the metadata that the hub reads in front.

    Args:
        run: finished, so that its summary is there.
        repo: OWNER/NAME that the card is for.
        base_model: OWNER/NAME of the model that it started from; None: not on the hub, or not known.
    """
    method = str(run.setting("algorithm.name", "?"))
    scores = evaluations(run)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["reinforcement-learning", "rlvr", method, "owpo-megatron"]
    if base_model:
        front["base_model"] = base_model
    if scores:
        front["model-index"] = [{"name": repo.rpartition("/")[2], "results": [_result(one) for one in scores]}]
    started = base_model or Path(str(run.setting("model.path", "?"))).name
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {repo.rpartition('/')[2]}",
        f"`{started}` trained with {method.upper()} ([paper]({PAPER})) on verifiable rewards, by owpo_megatron "
        f"{__version__}.",
        "## Evaluation",
        *([_table(scores)] if scores else ["No evaluation was made by this run."]),
        "## Training",
        "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows(run).items())]),
        "## Configuration",
        f"```yaml\n{yaml.safe_dump(_without_paths(run.config), sort_keys=False).strip()}\n```",
    ]
    return (
        "\n\n".join(lines[:3]).replace("---\n\n", "---\n").replace("\n\n---", "\n---")
        + "\n\n"
        + ("\n\n".join(lines[3:]) + "\n")
    )


def evaluations(run: RunMetrics) -> list[dict[str, Any]]:
    """Scores of the last evaluation with their intervals, a mapping per set."""
    if not run.evals:
        return []
    name = step_name(run.evals[-1]["step"])
    files = sorted(RunFolder(run.folder).evaluations.glob(f"{name}*.json"))
    found = [json.loads(file.read_text()) for file in files if not file.stem.endswith("_eval")]
    return [one for one in found if "metrics" in one]


def _table(scores: list[dict[str, Any]]) -> str:
    lines = ["| set | metric | score | 95 % interval | problems x samples |", "|---|---|---|---|---|"]
    for one in scores:
        for metric, value in one["metrics"].items():
            interval = f"{100 * value['low']:.1f} - {100 * value['high']:.1f} %"
            size = f"{one['problems']} x {one['samples']}"
            shown = metric_title(metric)
            lines.append(f"| {one['title']} | {shown} | {100 * value['value']:.1f} % | {interval} | {size} |")
    return "\n".join(lines)


def _result(one: dict[str, Any]) -> dict[str, Any]:
    """An entry of the card's model-index."""
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": str(one["title"]), "type": str(one["set"])},
        "metrics": [
            {"type": metric, "name": metric_title(metric), "value": round(100 * value["value"], 2)}
            for metric, value in one["metrics"].items()
        ],
    }


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The sections that decide what was learned; places of this machine stay here."""
    wanted = ("seed", "algorithm", "rollout", "optimizer", "reference", "verifier", "parallel")
    kept = {name: config[name] for name in wanted if name in config}
    hidden = ("path", "replay", "save", "save_tokens")
    return {
        name: {field: value for field, value in section.items() if field not in hidden and value is not None}
        if isinstance(section, dict)
        else section
        for name, section in kept.items()
    }
