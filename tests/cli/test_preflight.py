"""What is found before anything starts.

The engine's own interpreter is looked at in tests/rollout, the model's shape by the trainer.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preflight as room
from owpo_megatron.launch.preflight import preflight


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration with nothing wrong, and an engine that runs already."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return {
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "task:cipher"},
        "rollout": {"prompts_per_step": 16},
        "engine": {"urls": ["http://127.0.0.1:1"]},
    }


def mistake(raw: dict[str, Any], **changes: dict[str, Any]) -> UserError:
    for section, fields in changes.items():
        raw[section] = {**raw.get(section, {}), **fields}
    with pytest.raises(UserError) as caught:
        preflight(Config.build(raw))
    return caught.value


def test_nothing_wrong(raw: dict[str, Any]) -> None:
    preflight(Config.build(raw | {"parallel": {"tp": 2, "pp": 3}}))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "path", "no/such/folder"),
        ("data", "source", "task:chess"),
        ("data", "source", "problems.csv"),
        ("data", "source", "missing.jsonl"),
        ("data", "eval_source", "missing.parquet"),
        ("reference", "path", "no/such/folder"),
        ("rollout", "replay", "no/such/folder"),
        ("engine", "device", "cuda"),
        ("engine", "urls", ["127.0.0.1:30000"]),
        ("engine", "router", "http://127.0.0.1:30001"),
        ("engine", "count", 2),
        ("sync", "transport", "ipc"),
        ("sync", "fp8", True),
        ("sglang", "quantization", "fp8"),
        ("megatron", "fp8", "hybrid"),
    ],
)
def test_the_field_at_fault_is_named(raw: dict[str, Any], section: str, field: str, value: Any) -> None:
    error = mistake(raw, **{section: {field: value}})
    wanted = "data.source" if value == "task:chess" else f"{section}.{field}"
    assert error.field == wanted
    assert str(value if not isinstance(value, list) else value[0]) in str(error)
    assert error.remedy


def test_changes_of_weights_need_a_mirror(raw: dict[str, Any]) -> None:
    delta = {"transport": "disk", "delta": True}
    for engine in ({"urls": ["http://127.0.0.1:30000"]}, {"urls": [], "router": "http://127.0.0.1:30001"}):
        error = mistake(raw, sync=delta, engine=engine)
        assert error.field == "sync.delta" and "owpo serve --rendezvous" in error.remedy


def test_an_empty_model_folder(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "neither config.json" in mistake(raw, model={"path": str(tmp_path / "empty")}).remedy


def test_a_converted_model_has_its_hf_files_inside(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "megatron" / "hf").mkdir(parents=True)
    (tmp_path / "megatron" / "hf" / "config.json").write_text("{}")
    preflight(Config.build(raw | {"model": {"path": str(tmp_path / "megatron")}}))


def test_a_port_in_use(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the port's check: an engine of our own needs SGLang's environment."""
    monkeypatch.setattr(room, "check_environment", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert mistake(raw, engine={"urls": [], "port": port}).field == "engine.port"
    preflight(Config.build(raw))


def test_the_first_record_is_read(raw: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.touch()
    assert mistake(raw, data={"source": str(file)}).remedy == "holds no records"
    file.write_text('{"question": "1+1", "answer": "2"}\n')
    assert "lacks `problem`" in mistake(raw, data={"source": str(file)}).remedy


def test_a_run_name_stays_inside_runs_dir(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="plain folder name"):
        preflight(Config.build(raw | {"name": "../elsewhere"}))


def test_a_runs_dir_that_is_a_file(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="runs_dir"):
        preflight(Config.build(raw | {"runs_dir": str(tmp_path / "file")}))
