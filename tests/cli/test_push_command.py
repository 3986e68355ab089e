"""`owpo push`, against a hub that runs here: what is sent, what is asked, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from fake_hub import Hub
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with an evaluation and a result."""
    raw = {"name": "a", "runs_dir": str(tmp_path), "model": {"path": "base"}, "data": {"source": "task:cipher"}}
    config = Config.build(raw | {"optimizer": {"steps": 2}, "checkpoint": {"push_to_hub": "me/from-config"}})
    folder = config.run_dir
    config.save(folder / "config.yaml")
    scores = {"pass@1": 0.75, "problems": 40, "samples": 8}
    lines = [
        {"step": 1, "reward_mean": 0.5, "seconds": {"total": 1.0}},
        {"step": 2, "reward_mean": 0.6, "seconds": {"total": 1.0}},
        {"step": 2, "eval": scores},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"name": "a", "parallel": {"tp": 2}}))
    (folder / "eval").mkdir()
    held = {"set": "held_out", "title": "held out", "problems": 40, "samples": 8}
    held["metrics"] = {"pass@1": {"value": 0.75, "low": 0.7, "high": 0.8}}
    (folder / "eval" / "step_000002.json").write_text(json.dumps(held))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-0.6B"}))
    (folder / "hf" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_result_arrives_with_a_card_of_its_numbers(hub: type[Hub], run: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine", "--private"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert hub.created[0]["name"] == "mine" and hub.created[0]["organization"] == "me"
    assert set(hub.uploaded) == {"README.md", "config.json", "model.safetensors"}
    assert hub.uploaded["model.safetensors"] == b"weights"
    card = hub.uploaded["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and "owpo" in front["tags"]
    (found,) = front["model-index"][0]["results"]
    assert found["metrics"] == [{"type": "pass@1", "name": "Pass@1", "value": 75.0}]
    assert "| held out | Pass@1 | 75.0 % | 70.0 - 80.0 % | 40 x 8 |" in card
    assert "steps: 2" in card and str(run.parent) not in card


def test_a_card_alone_and_a_repository_from_the_configuration(run: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "--card-only"])
    assert result.exit_code == 0 and "# from-config" in (run / "hf" / "README.md").read_text()


def test_a_refusal_is_one_line(hub: type[Hub], run: Path) -> None:
    hub.refuses = True
    result = CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine"])
    assert isinstance(result.exception, UserError) and "check the token" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_what_cannot_be_pushed(run: Path) -> None:
    assert "write OWNER/NAME" in str(CliRunner().invoke(app, ["push", str(run), "--repo", "mine"]).exception)
    (run / "hf" / "config.json").unlink()
    assert "has no hf/" in str(CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine"]).exception)
