"""A comparison from the command line: real runs on the session's SGLang server, each made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from owpo import Owpo

pytestmark = pytest.mark.process

SECONDS = 420


def lab_file(tmp_path: Path, small: dict[str, Any], server_url: str) -> Path:
    """Two methods, one seed, two steps; the reference takes one."""
    run = {name: section for name, section in small.items() if name not in ("seed", "runs_dir", "reference")}
    run["rollout"] = small["rollout"] | {"save": False}
    run["optimizer"] = small["optimizer"] | {"steps": 2}
    run["eval"] = {"every": 1, "samples": 2, "pass_at": [1], "limit": 8}
    run["engine"] = {"urls": [server_url]}
    raw = {
        "name": "lab",
        "out_dir": str(tmp_path / "out"),
        "run": run,
        "methods": ["owpo", "dapo"],
        "seeds": [1],
        "reference": {"steps": 1},
        "regimes": {"flipped": {"set": {"verifier.flip": 0.25}}},
    }
    file = tmp_path / "lab.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_compare_makes_every_run_once(tmp_path: Path, small: dict[str, Any], server_url: str) -> None:
    """Not covered: several workers, which need an engine each (the lab itself runs that way)."""
    file = lab_file(tmp_path, small, server_url)
    first = Owpo(tmp_path / "logs", "compare", "-c", str(file))
    assert first.process.wait(SECONDS) == 0, first.stderr
    lab = tmp_path / "out" / "lab"
    table = json.loads((lab / "table.json").read_text())
    owpo, dapo = table["regimes"]["flipped"]["entries"]
    assert owpo["final"]["count"] == dapo["final"]["count"] == 1
    # an update's tokens count 3, and OWPO's total has the reference's training in it
    assert owpo["total_token_passes"]["mean"] > 0
    assert dapo["minus"]["auc"]["mean"] == owpo["auc"]["mean"] - dapo["auc"]["mean"]
    runs = {folder.name.rsplit("-", 1)[0]: folder for folder in (lab / "runs").iterdir()}
    assert sorted(runs) == ["flipped-dapo-s1", "flipped-dapo-s1-3", "flipped-owpo-s1", "reference-dapo-s1001"]
    lines = [json.loads(text) for text in (runs["flipped-owpo-s1"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["kl_ref"] != 0 for line in lines if "kl_ref" in line] == [True, True]  # the reference was trained
    assert all("rewards_flipped" in line for line in lines if "reward_mean" in line)
    assert (lab / "flipped_scores.png").read_bytes()[:4] == b"\x89PNG"

    # a run that is lost is made again, alone, and comes out the same
    before = {name: (folder / "metrics.jsonl").stat().st_mtime_ns for name, folder in runs.items()}
    shutil.rmtree(runs["flipped-owpo-s1"])
    again = Owpo(tmp_path / "logs", "compare", "-c", str(file))
    assert again.process.wait(SECONDS) == 0, again.stderr
    after = {name: (folder / "metrics.jsonl").stat().st_mtime_ns for name, folder in runs.items()}
    assert {name for name in after if after[name] != before[name]} == {"flipped-owpo-s1"}
    assert json.loads((lab / "table.json").read_text())["regimes"]["flipped"]["entries"][0]["auc"] == owpo["auc"]


def test_both_protocols_from_start_to_end(tmp_path: Path, small: dict[str, Any], server_url: str) -> None:
    """The smallest ones: that a best checkpoint becomes the reference, that stages swap, that tables come out."""
    raw = yaml.safe_load(lab_file(tmp_path, small, server_url).read_text())
    common = {name: raw[name] for name in ("out_dir", "run", "seeds")} | {"methods": ["owpo"]}
    two_stage, evolve = tmp_path / "two_stage.yaml", tmp_path / "evolve.yaml"
    two_stage.write_text(yaml.safe_dump(common | {"first": {"steps": 2}}))
    evolve.write_text(yaml.safe_dump(common | {"prior": {"steps": 1}, "iterations": 2, "stage_steps": 2}))

    first = Owpo(tmp_path / "logs", "protocol", "two-stage", "-c", str(two_stage))
    assert first.process.wait(SECONDS) == 0, first.stderr
    assert "best above the reference" in first.stdout
    runs = {one.name.rsplit("-", 1)[0]: one for one in (tmp_path / "out" / "two-stage" / "runs").iterdir()}
    guided = yaml.safe_load((runs["two-stage-owpo-s1"] / "config.yaml").read_text())
    assert Path(guided["reference"]["path"]) == runs["reference-dapo-s1001"] / "best"

    second = Owpo(tmp_path / "logs", "protocol", "self-evolve", "-c", str(evolve))
    assert second.process.wait(SECONDS) == 0, second.stderr
    assert "iteration 2" in second.stdout
    run = next((tmp_path / "out" / "self-evolution" / "runs").glob("self-evolution-owpo-s1-*"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["reference"]["reason"] == "best_of_stage"
