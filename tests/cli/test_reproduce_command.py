"""`owpo reproduce` before anything is trained: mistakes, the dry run, Figure 3, what is submitted and what waits.

Submission itself is tested in tests/slurm, runs and evaluations in tests/e2e/test_reproduce.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipe_models import SHAPES
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import RunFolder


def owpo(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen2.5-Math-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES["qwen2.5-math-7b"]))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1"], "artefact = table1: use one of table2, table3"),
        (["table2"], r"--model = \(none\): name the base model's folder; only --scale cpu has one of its own"),
        (["table2", "--model", "Qwen3-4B"], "model = Qwen3-4B: the paper has Qwen2.5-Math-7B and Qwen3-8B-Base"),
        (["table2", "--scale", "cpu", "--preset", "mine"], "--preset = mine: use one of paper, recommended"),
        (
            ["table2", "--scale", "cpu", "--beside", "paper"],
            "--beside = paper: the sets of --scale cpu have no numbers",
        ),
        (
            ["reversals", "--model", "Qwen3-8B-Base", "--beside", "paper"],
            "--beside = paper: the paper has no such figure",
        ),
        (["table2", "--scale", "cpu", "--model", "nowhere"], "--model = nowhere: "),
        (["figure3", "algorithm.beta=1"], "figure3 = algorithm.beta=1: it has no runs to change"),
        (["table2", "--scale", "cpu", "--seeds", "one"], "--seeds = one: write integers separated by commas"),
        (["table2", "--scale", "cpu", "optimizer.lr=fast"], "optimizer.lr = fast: "),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        owpo(*arguments, "--out", str(tmp_path / "out"))


def test_the_dry_run_lists_everything_and_starts_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = owpo("table2", "--model", str(model), "--out", str(out), "--dry-run")
    for label in ("grpo-s1", "dapo-s1", "sym_dapo-s1", "mopd-s1", "opd-s1", "owpo-s1"):
        assert label in printed
    assert "6 runs, 6 to train: 2,400 steps" in printed and "GPU hours, a rough estimate" in printed
    assert "AIME25 at 12 checkpoints (960 responses each), AMC at 12 checkpoints (2,656 responses each)" in printed
    assert not out.exists()


def test_the_dry_run_on_two_cores_needs_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's model is not in a fresh clone; the command itself would make it."""
    monkeypatch.chdir(tmp_path)
    printed = owpo("reversals", "--scale", "cpu", "--out", "out", "--dry-run")
    assert "7 runs, 7 to train: 140 steps" in printed and "evaluations afterwards: none" in printed
    assert not (tmp_path / "cache").exists()


def test_figure_3_needs_no_run(tmp_path: Path) -> None:
    assert "no runs, no evaluations" in owpo("figure3", "--out", str(tmp_path), "--dry-run")
    assert not any(tmp_path.iterdir())
    owpo("figure3", "--out", str(tmp_path))
    assert (tmp_path / "figure3.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_are_submitted_once_their_reference_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First DAPO and GRPO; the guided ones when DAPO has finished; a run with a job is left alone."""
    submitted: list[Any] = []

    def submit(job: Any) -> Any:
        submitted.append(job.config)
        return SimpleNamespace(jobs=[len(submitted)])

    def active(run_dir: Path) -> list[Any]:
        return [SimpleNamespace(active=lambda: [run_dir])] if run_dir in [one.run_dir for one in submitted] else []

    for name, stand_in in (("submit.submit_job", submit), ("record.submissions", active)):
        monkeypatch.setattr(f"owpo_megatron.launch.slurm.{name}", stand_in)
    for name in ("check_job", "check_model"):
        monkeypatch.setattr(f"owpo_megatron.launch.checks.{name}", lambda job: None)
    arguments = ("table2", "--model", str(model), "--out", str(tmp_path / "out"), "--launch", "launch.account=lab")
    printed = owpo(*arguments)
    assert [config.algorithm.name for config in submitted] == ["grpo", "dapo"]
    assert submitted[1].launch.account == "lab" and "waits for dapo-s1: owpo-s1" in printed

    dapo = RunFolder(submitted[1].run_dir)
    dapo.path.mkdir(parents=True)
    dapo.summary.write_text("{}")
    printed = owpo(*arguments)
    assert "has a job: grpo-s1" in printed and "not finished: grpo-s1" in printed
    assert [config.algorithm.name for config in submitted[2:]] == ["sym_dapo", "mopd", "opd", "owpo"]
    assert {config.reference.path for config in submitted[2:]} == {dapo.best}
