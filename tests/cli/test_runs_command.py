"""`owpo runs`: every status from what a folder holds."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.cli.runs import state_of
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def make_run(root: Path, name: str, steps: int, **files: str) -> Path:
    raw = {"name": name, "runs_dir": str(root), "model": {"path": "m"}, "data": {"source": "task:cipher"}}
    config = Config.build(raw | {"optimizer": {"steps": 8}})
    config.save(config.run_dir / "config.yaml")
    lines = [{"step": 0, "eval": {"pass@1": 0.1}}]
    lines += [{"step": step, "reward_mean": step / 10, "seconds": {"total": 1.0}} for step in range(1, steps + 1)]
    lines += [{"step": steps, "eval": {"pass@1": 0.5}}] if steps else []
    if steps:
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, text in files.items():
        path = config.run_dir / file.replace("__", "/").replace("_txt", ".txt").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return config.run_dir


def test_every_status(tmp_path: Path) -> None:
    finished = make_run(tmp_path, "finished", 8, summary_json="{}")
    stopped = make_run(tmp_path, "stopped", 3)
    failed = make_run(tmp_path, "failed", 2, logs__error_rank_0_txt="trace")
    fresh = make_run(tmp_path, "fresh", 0)
    running = make_run(tmp_path, "running", 4)
    with (running / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {folder.name: state_of(folder).status for folder in (finished, stopped, failed, fresh, running)}
    assert found == {
        "finished": "finished", "stopped": "stopped", "failed": "failed", "fresh": "not started", "running": "running"
    }  # fmt: skip
    assert state_of(running).status == "stopped", "its process has ended"
    one = state_of(finished)
    assert (one.step, one.steps, one.reward, one.score, one.method) == (8, 8, 0.8, "pass@1 10.0 % -> 50.0 %", "owpo")


def test_the_table_finds_runs_of_comparisons_too(tmp_path: Path) -> None:
    make_run(tmp_path, "mine", 3)
    make_run(tmp_path / "lab" / "runs", "owpo-s1", 8, summary_json="{}")
    result = CliRunner().invoke(app, ["runs", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "3/8" in result.output and "8/8" in result.output and "0.300" in result.output
    assert {one["name"] for one in json.loads((tmp_path / "out.json").read_text())} == {"mine", "owpo-s1"}


def test_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in CliRunner().invoke(app, ["runs", str(tmp_path)]).output
    assert isinstance(CliRunner().invoke(app, ["runs", str(tmp_path / "gone")]).exception, UserError)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_completion(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that `owpo --install-completion` installs, as typer makes it for `owpo`."""
    from typer.completion import get_completion_script

    script = get_completion_script(prog_name="owpo", complete_var="_OWPO_COMPLETE", shell=shell)
    assert "_OWPO_COMPLETE" in script and "owpo" in script
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output
