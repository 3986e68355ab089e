"""`owpo train` around the trainer: run folder, lock, exit codes. The trainer itself is replaced by a tiny module."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml
from described import describe_model

from owpo_megatron.api.run_folder import changed_fields, claimed, move_aside
from owpo_megatron.cli import running
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError

pytestmark = pytest.mark.process

run_trainer = partial(running.run_trainer, module="tiny_loop")

TRAINER = """
    import argparse, json, subprocess, sys
    from pathlib import Path
    from owpo_megatron.config import Config
    from owpo_megatron.errors import UserError

    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--eval-only", action="store_true")
    args = parser.parse_args()
    config = Config.load(args.config)
    if config.seed == 2:
        raise UserError("seed", 2, "take another one")
    if config.seed == 3:
        raise RuntimeError("broken")
    if config.seed == 5:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"], close_fds=False)
    line = {"step": 1, "reward_mean": 0.5, "eval_only": args.eval_only, "config": str(args.config)}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(line))
    (config.run_dir / "checkpoints" / "step_000001").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    (tmp_path / "tiny_loop.py").write_text(textwrap.dedent(TRAINER))
    describe_model(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Config.build(
        {
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(tmp_path / "model")},
            "data": {"source": "task:cipher"},
            "engine": {"urls": ["http://127.0.0.1:1"]},
        }
    )


def test_a_run_leaves_its_resolved_configuration(config: Config) -> None:
    assert run_trainer(config)
    assert Config.load(config.run_dir / "config.yaml") == config
    assert json.loads((config.run_dir / "metrics.jsonl").read_text())["eval_only"] is False


def test_an_evaluation_leaves_the_configuration_alone(config: Config) -> None:
    run_trainer(config)
    changed = config.model_copy(update={"seed": 9})
    run_trainer(changed, ["--eval-only"], keep_config=False)
    assert json.loads((config.run_dir / "metrics.jsonl").read_text())["eval_only"] is True
    assert Config.load(config.run_dir / "config.yaml").seed == config.seed


@pytest.mark.parametrize(
    ("seed", "code", "said"), [(2, 2, "error: seed = 2: take"), (3, 1, "failed: rank 0: RuntimeError: broken")]
)
def test_a_failure_is_one_line_with_its_code(
    config: Config, seed: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end:
        run_trainer(config.model_copy(update={"seed": seed}))
    assert end.value.exit_code == code
    captured = capsys.readouterr().err
    assert captured.startswith(said)
    assert captured.count("\n") == 1


def test_a_refused_configuration_does_not_become_the_runs(config: Config) -> None:
    run_trainer(config)
    with pytest.raises(typer.Exit):
        run_trainer(config.model_copy(update={"seed": 2}))
    assert Config.load(config.run_dir / "config.yaml") == config


def test_resuming_says_what_changed(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run_trainer(config)
    capsys.readouterr()
    changed = Config.build(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))) | {"seed": 4})
    assert changed_fields(config.model_dump(mode="json"), changed) == ["seed 1 -> 4"]
    run_trainer(changed)
    said = capsys.readouterr().out
    assert "resuming" in said and "seed 1 -> 4" in said


def test_fresh_moves_the_earlier_run_aside_and_keeps_it(config: Config) -> None:
    run_trainer(config)
    (config.run_dir / "mark").touch()
    run_trainer(config, fresh=True)
    aside = config.run_dir.with_name("run.1")
    assert (aside / "mark").exists() and not (config.run_dir / "mark").exists()
    assert move_aside(config.run_dir) == config.run_dir.with_name("run.2")
    assert move_aside(config.run_dir) is None


def test_two_runs_never_share_a_folder(config: Config) -> None:
    config.run_dir.mkdir(parents=True)
    for fresh in (False, True):  # moved aside, it would be written under its old name by the one that works in it
        with claimed(config), pytest.raises(UserError, match="another owpo command"):
            run_trainer(config, fresh=fresh)
    assert run_trainer(config) and not config.run_dir.with_name("run.1").exists()


def test_a_process_that_a_rank_leaves_behind_does_not_keep_the_folder(config: Config) -> None:
    run_trainer(config.model_copy(update={"seed": 5}))
    assert run_trainer(config)


def test_under_torchrun_the_rank_runs_in_this_process(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(config.runs_dir.parent))
    for name, value in {"RANK": "1", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert run_trainer(config)
    line = json.loads((config.run_dir / "metrics.jsonl").read_text())
    assert line["config"] == str(config.run_dir / "logs" / "config_rank_1.yaml")
    with pytest.raises(UserError, match="--fresh"):
        run_trainer(config, fresh=True)


def test_the_command_goes_through(tmp_path: Path) -> None:
    """The console script's module, as a process of its own, up to the first check."""
    (tmp_path / "c.yaml").write_text("model: {path: nowhere}\ndata: {source: 'task:cipher'}\n")
    command = [sys.executable, "-m", "owpo_megatron.cli.main", "train", "-c", "c.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.path = nowhere: no such folder")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["model:\n  pa", "- a\n- b\n", "algorithm:\nverifier: {}\n", "\x00\x01", "a: [1"])
def test_a_damaged_configuration_of_the_run_is_named_and_written_anew(config: Config, content: str) -> None:
    config.run_dir.mkdir(parents=True)
    file = config.run_dir / "config.yaml"
    file.write_text(content)
    with claimed(config) as claim:
        assert claim.changed == (f"unknown, since {file} cannot be read; it is written anew",)
    assert Config.load(file) == config
