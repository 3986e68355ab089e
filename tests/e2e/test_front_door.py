"""`train` and `load_run` from a user's script, on recorded rollouts: one rank in its process, two in their own.

In a real notebook kernel only by hand: tests/e2e/test_tutorial.py runs the notebook's cells in a plain interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from owpo import Owpo, write_config

from owpo_megatron import UserError, load_run
from owpo_megatron.errors import UserError as SameUserError

pytestmark = pytest.mark.ranks
SCRIPT = Path(__file__).parent / "front_door_script.py"


@pytest.fixture(scope="module")
def config(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a checkpoint every two; the configuration's own method and rule are others."""
    here = tmp_path_factory.mktemp("front_door")
    sizes = {"optimizer": recorded["optimizer"] | {"steps": 4}, "checkpoint": {"every": 2, "keep": 9}}
    return write_config(here / "run.yaml", recorded, sizes, {"runs_dir": str(here / "runs")})


def script(config: Path, what: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT), str(config), what], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_one_rank_twice_in_one_process_leaves_nothing_behind(config: Path) -> None:
    found = script(config, "twice")
    assert found["changed"] == []
    assert found["steps"] == [[1, 2, 3, 4]] * 2 and found["checkpoints"] == [2, 4] and found["ended"] == [4]
    assert found["rewards"][0] == found["rewards"][1] and len(set(found["rewards"][0])) > 1
    assert {"reward_mean", "loss", "seconds.update", "verifier.ok"} <= set(found["columns"])
    assert found["rule"] == "python:__main__:same_text"
    assert "4 steps, finished" in found["repr"] and "<table" in found["html"]


def test_two_ranks_get_method_and_verifier_by_value(config: Path) -> None:
    """The same rewards as one rank: prompts, responses and verdicts do not depend on the ranks."""
    found = script(config, "two_ranks")
    assert found["steps"] == [1, 2, 3, 4] and found["checkpoints"] == [2, 4] and found["ended"] == [4]
    assert found["rewards"] == list(load_run(config.parent / "runs" / "a").metrics["reward_mean"])
    assert found["left"] == []


def test_a_finished_run_is_read(config: Path) -> None:
    """Everything loads without the method but the configuration, which names it."""
    run = load_run(config.parent / "runs" / "a")
    assert run.finished and run.steps == 4 and run.summary["algorithm"] == "plain_gradient"
    assert list(run.metrics.index) == [1, 2, 3, 4] and run.metrics["seconds.total"].gt(0).all()
    assert sorted(run.checkpoints) == [2, 4] and run.best is None and run.evaluations.empty
    assert (run.weights / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"algorithm.name = plain_gradient: .*use one of"):
        _ = run.config
    with pytest.raises(UserError, match="step = 1: no rollouts of it"):
        run.rollouts(1)
    assert UserError is SameUserError


def test_callbacks_stop_a_run_that_goes_on_later_but_not_without_its_parts(config: Path) -> None:
    found = script(config, "stop")
    assert found["runs"][0] == [2, True] and found["runs"][1] == [4, False] and found["went_on"] == [3, 4]
    steps, stopped = found["runs"][2]
    assert stopped and 2 <= steps < 4, "two ranks finish the step during which the callback was called"
    first, second = script(config, "resume_without")["said"]
    assert first.startswith("verifier.rule = auto: the run so far has python:__main__:same_text, which was given")
    assert second.startswith("algorithm.name = owpo: the run so far has plain_gradient, which was given from Python")


def test_the_command_refuses_a_run_whose_method_it_lacks(config: Path, tmp_path: Path) -> None:
    owpo = Owpo(tmp_path, "train", "-c", str(config), "name=a")
    assert owpo.wait() == 2
    assert "algorithm.name = owpo: the run so far has plain_gradient" in owpo.stderr


def test_a_callback_that_fails_is_named_and_the_run_is_saved(config: Path) -> None:
    said = script(config, "broken")["said"]
    assert said == ["Watch.on_step raised ValueError: no more; the run was saved and stopped"] * 2
    for name in ("broken1", "broken2"):
        run = load_run(config.parent / "runs" / name)
        assert 2 <= run.steps < 4 and max(run.checkpoints) == run.steps and not run.finished
        assert "not finished" in repr(run) and run.weights == run.checkpoints[run.steps]


def test_ctrl_c_lets_several_ranks_save_and_reaches_the_caller(config: Path) -> None:
    found = script(config, "interrupt")
    run = load_run(config.parent / "runs" / "interrupted")
    assert found["steps"][:2] == [1, 2] and found["children"] == ""
    assert 2 <= run.steps < 4 and max(run.checkpoints) == run.steps


def test_a_run_of_the_command_is_read_and_gone_on_with(config: Path, recorded: dict[str, Any], tmp_path: Path) -> None:
    """Trained by `owpo` with a built-in method, lengthened from Python in one process."""
    Owpo(tmp_path, "train", "-c", str(config), "name=both", "optimizer.steps=2").done()
    code = f"from owpo_megatron import train; print(train({str(config)!r}, ['name=both']).steps)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "4", done.stderr[-3000:]
    assert "resuming" in done.stdout and "optimizer.steps 2 -> 4" in done.stdout
    run = load_run(config.parent / "runs" / "both")
    assert list(run.metrics.index) == [1, 2, 3, 4] and run.config.algorithm.name == "owpo"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.yaml; give a folder that a run has made"):
        load_run(tmp_path)
