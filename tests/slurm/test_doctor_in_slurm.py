"""The doctor on nodes of a real Slurm: srun starts its ranks. All nodes are this machine, under one host name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from owpo_megatron.cli.main import app

pytestmark = pytest.mark.slurm


def test_two_nodes_are_looked_at(lab: Any, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The doctor is called outside an allocation."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    arguments = ["doctor", "-c", str(tmp_path / "run.yaml"), "--nodes", "2", "--only", "ranks"]
    arguments += ["--json", str(tmp_path / "told.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = {finding["what"]: finding for finding in json.loads((tmp_path / "told.json").read_text())["findings"]}
    assert found["nodes"]["detail"].startswith("2 ranks on 1 node")
    assert found["torch"]["detail"].startswith("2.13.0")  # of both nodes, in one row
    assert "is the same for all ranks" in found["run folder"]["detail"]
    assert "GB/s" in found["all-reduce"]["detail"]
