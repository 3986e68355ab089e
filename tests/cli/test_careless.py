"""Careless use of every kind of command: one line that names what is wrong, before the work, and never a traceback."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from owpo_megatron.cli import main
from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a space and a letter beyond ASCII in its name, and some files that are wrong."""
    folder = tmp_path / "my wörk"
    (folder / "folder").mkdir(parents=True)
    monkeypatch.chdir(folder)
    Path("train.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    Path("empty.jsonl").write_text("")
    Path("file").write_text("x")
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{bad")
    Path("cut").mkdir()
    Path("cut/model.safetensors").write_bytes(b"x" * 20)
    Path("typo.yaml").write_text("modelx: {path: m}\ndata: {source: 'task:cipher'}\n")
    Path("run.yaml").write_text("model: {path: broken}\ndata: {source: 'task:cipher'}\n")
    return folder


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("data check train.jsonl --rule nope", "--rule = nope: use one of auto, math,"),
        ("data check train.jsonl --json folder", "FILE = folder: is a folder; name a file in it"),
        ("data check train.jsonl --json file/x.json", "FILE = file/x.json: cannot be written"),
        ("verify empty.jsonl", "cases = empty.jsonl: holds no records"),
        ("verify train.jsonl --json folder", "FILE = folder: is a folder"),
        ("config init new.yaml --model broken", "--model = broken: its config.json is not JSON"),
        ("config init new.yaml --model file", "--model = file: no such folder"),
        ("config init new.yaml --data empty.jsonl", "--data = empty.jsonl: holds no records"),
        ("config init new.yaml --data folder", "--data = folder: is no file of problems"),
        ("config show -c typo.yaml", "modelx = {'path': 'm'}: unknown field"),
        ("train -c run.yaml", "model.path = broken: its config.json is not JSON"),
        ("train -c run.yaml sinks.to=tensorboard", "sinks.to = tensorboard: write a list: [a, b]"),
        ("train -c run.yaml name=2026-01-01", "name = 2026-01-01: write a text; put it in quotes"),
        ("train -c run.yaml data.date=yesterday", "data.date = yesterday: write a date, as 2026-01-31"),
        ("drift cut cut", "model = cut/model.safetensors: is no whole safetensors file"),
        ("serve broken --log folder", "FILE = folder: is a folder"),
    ],
)
def test_a_mistake_is_one_line(command: str, line: str, here: Path) -> None:
    error = CliRunner().invoke(app, shlex.split(command)).exception
    assert isinstance(error, UserError), error
    assert str(error).startswith(line) and "\n" not in str(error)


def test_a_port_that_is_none_is_refused(here: Path) -> None:
    assert CliRunner().invoke(app, ["serve", "broken", "--port", "99999"]).exit_code == 2


def test_a_host_that_is_none_is_not_called_a_port_in_use() -> None:
    from owpo_megatron.engine.server import probe_port

    with pytest.raises(UserError, match=r"engine.host = not a host: is no address of this machine"):
        probe_port("not a host", 0)


@pytest.mark.parametrize("name", ["my run.yaml", "wörk: 1.yaml", "2026-01-01.yaml", "on.yaml"])
def test_a_starter_file_holds_any_name(name: str, here: Path) -> None:
    Path("modèle #1").mkdir()
    Path("modèle #1/config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512}))
    Path("it's.jsonl").write_text('{"my question": "1+1?", "answer": "2"}\n')
    result = CliRunner().invoke(app, ["config", "init", name, "--model", "modèle #1", "--data", "it's.jsonl"])
    assert result.exception is None, result.exception
    loaded = Config.load(name)
    assert (loaded.name, str(loaded.model.path), loaded.data.source) == (Path(name).stem, "modèle #1", "it's.jsonl")
    assert f"owpo train -c {shlex.quote(name)}" in result.output
    shown = CliRunner().invoke(app, ["config", "show", "-c", name]).output
    assert "modèle #1" in shown and yaml.safe_load(shown)["name"] == Path(name).stem


def test_a_run_that_cannot_be_read_does_not_hide_the_others(here: Path) -> None:
    for run in ("good", "bad"):
        Path("runs", run).mkdir(parents=True)
        Path("runs", run, "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n')
    Path("runs/good/config.yaml").write_text("name: good\n")
    Path("runs/bad/config.yaml").write_text("name: [\n")
    output = CliRunner().invoke(app, ["runs"]).output
    assert "runs/good" in output and "runs/bad" in output and "unreadable" in output


@pytest.mark.parametrize("path", ["x" * 300 + ".jsonl", "/proc/self/mem/x.jsonl"])
def test_an_error_of_the_system_is_one_line(
    path: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["owpo", "data", "check", path])
    with pytest.raises(SystemExit) as ended:
        main.main()
    shown = capsys.readouterr()
    assert ended.value.code in (1, 2)
    assert "Traceback" not in shown.err and len(shown.err.strip().splitlines()) == 1
