"""The tutorial notebook, cell by cell in a plain interpreter, with a real SGLang server.

The cell with the tag `parameters` is replaced: fewer steps, and the tests' model, server and folder. That the cells run
in a Jupyter kernel is not covered.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from owpo import ROOT

from owpo_megatron import evaluate, load_run

pytestmark = [pytest.mark.ranks, pytest.mark.server]
NOTEBOOK = ROOT / "examples" / "notebooks" / "new_method.ipynb"


def test_the_notebook_trains_with_its_own_method(server_url: str, base_model: Path, tmp_path: Path) -> None:
    overrides = [
        *("name=tutorial", f"runs_dir={tmp_path}", f"model.path={base_model}", f"engine.urls=[{server_url}]"),
        *("parallel.tp=1", "optimizer.steps=3", "eval.every=0", "eval.before=false", "eval.limit=10"),
    ]
    parameters = f"config = {str(ROOT / 'examples' / 'quickstart' / 'config.yaml')!r}\noverrides = {overrides!r}\n"
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([parameters, *("".join(cell["source"]) for cell in cells[1:])]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    run = load_run(tmp_path / "tutorial")
    assert run.finished and run.steps == 3 and run.summary["algorithm"] == "sign_gradient"
    assert run.metrics["reward_mean"].between(0, 1).all() and run.metrics["loss"].notna().all()
    assert run.metrics["updates"].eq(2).all() and run.metrics["grad_norm"].gt(0).all()
    rollouts = run.rollouts(3)
    assert len(rollouts) >= 16 * 8 and set(rollouts.finish_reason) <= {"stop", "length"}
    assert list(run.evaluations.index) == [3] and "pass@1" in run.evaluations
    assert run.weights == tmp_path / "tutorial" / "hf"
    result = evaluate(run, samples=2, limit=6)
    assert list(result.table.metric) == ["pass@1"] and list(result.table.checkpoint) == ["converged"]
    assert result.table.problems.item() == 6 and result.table.low.item() <= result["pass@1"] <= result.table.high.item()
    kept = json.loads((tmp_path / "tutorial" / "eval" / "step_000003" / "held_out.json").read_text())
    assert kept["metrics"]["pass@1"]["value"] == result["pass@1"]
    assert evaluate(run, samples=2, limit=6)["pass@1"] == result["pass@1"], "read back, not drawn again"
