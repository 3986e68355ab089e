"""The doctor on this machine, and on a configuration with mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config, EngineConfig
from owpo_megatron.launch import doctor


def test_findings_come_with_remedies() -> None:
    """The whole round, two gloo processes included; what it finds depends on the machine, but not that it can tell."""
    findings = {finding.what: finding for finding in doctor.examine()}
    assert findings["torch"].status == "ok"
    assert findings["megatron-core"].detail == "0.16.1"
    assert findings["gloo"].status == "ok", findings["gloo"].detail
    assert all(finding.remedy for finding in findings.values() if finding.status != "ok")


def test_a_broken_configuration_fails(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"runs_dir: {tmp_path}/runs\nmodel: {{path: nowhere}}\ndata: {{source: 'task:cipher'}}\n"
        "engine: {python: /no/such/python}\n"
    )
    result = CliRunner().invoke(app, ["doctor", "-c", str(tmp_path / "c.yaml"), "--json", str(tmp_path / "d.json")])
    assert result.exit_code == 1
    written = json.loads((tmp_path / "d.json").read_text())
    status = {finding["what"]: finding["status"] for finding in written["findings"]}
    assert status["config: model"] == status["engine"] == "fail"
    assert status["config: data"] == "ok"
    assert written["machine"]["cores"] >= 1


def test_an_interpreter_without_sglang() -> None:
    import sys

    finding = doctor._engine(EngineConfig(python=Path(sys.executable)))
    assert (finding.status, finding.remedy) == ("fail", "run `make setup`, or set engine.python")


def test_too_few_cores_is_a_warning() -> None:
    assert doctor._cores(100_000).status == "warn"
    assert doctor._cores(1).status == "ok"


def test_gloo_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GLOO_CHECK", "raise SystemExit('no interface')")
    finding = doctor._gloo()
    assert (finding.status, finding.detail) == ("fail", "no interface")


def test_engines_that_run_elsewhere_need_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gloo", lambda: doctor.Finding("gloo", "ok", ""))
    raw = {"model": {"path": str(tmp_path)}, "data": {"source": "task:cipher"}, "runs_dir": str(tmp_path)}
    config = Config.build(raw | {"engine": {"urls": ["http://127.0.0.1:1"]}})
    assert "engine" not in [finding.what for finding in doctor.examine(config)]
