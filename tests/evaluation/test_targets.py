"""Selection of a run's weights by `owpo eval`, and the place of their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.serve import fingerprint, response_limit, stored_dtype
from owpo_megatron.evaluation.sets import SETS
from owpo_megatron.evaluation.targets import model_target, run_targets
from owpo_megatron.types import Prompt


@pytest.fixture
def config() -> Config:
    return Config.build({"name": "a", "model": {"path": "models/Qwen"}, "data": {"source": "task:cipher"}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints after 20 and 40 steps, one that was never finished, and the best after 20."""
    for place in ("checkpoints/step_000020", "checkpoints/step_000040", "weights/step_000020"):
        (tmp_path / "a" / place / "hf").mkdir(parents=True)
        (tmp_path / "a" / place / "manifest.json").write_text(place)
    (tmp_path / "a" / "checkpoints" / "step_000060").mkdir()
    (tmp_path / "a" / "best").symlink_to(Path("weights") / "step_000020", target_is_directory=True)
    return tmp_path / "a"


def test_the_best_and_the_newest(run: Path, config: Config) -> None:
    best, newest = run_targets(run, config, [], None)
    assert (best.checkpoints, best.weights.name, best.out) == (("best",), "step_000020", run / "eval" / "step_000020")
    assert best.weights.parent.name == "weights"
    assert (newest.checkpoints, newest.weights) == (("step 40",), run / "checkpoints" / "step_000040")
    (run / "summary.json").write_text("{}")  # trained to its end
    assert run_targets(run, config, ["newest"], None)[0].checkpoints == ("converged",)
    assert (newest.model, newest.method) == ("Qwen", "owpo (a)")


def test_one_folder_may_be_several_checkpoints(run: Path, config: Config) -> None:
    """The best is the step that is asked for: evaluated once, in both columns."""
    (both,) = run_targets(run, config, ["best", "20"], Path("out"))
    assert both.checkpoints == ("best", "step 20") and both.out == Path("out") / "a" / "step_000020"


def test_what_a_run_does_not_have(run: Path, config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a step that .* has: 20, 40"):
        run_targets(run, config, ["60"], None)
    (run / "best").unlink()
    assert [one.checkpoints for one in run_targets(run, config, [], None)] == [("step 40",)]
    with pytest.raises(UserError, match="checkpoint.keep_best=true"):
        run_targets(run, config, ["best"], None)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        run_targets(tmp_path, config, [], None)


def test_a_model_folder(tiny_model: Path, config: Config) -> None:
    target = model_target(tiny_model, config, None)
    assert (target.label, target.checkpoints, target.files) == (tiny_model.name, (), tiny_model)
    assert target.out == Path("runs") / "eval" / tiny_model.name
    assert stored_dtype(tiny_model) == "float32"


def test_a_fingerprint_knows_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    assert fingerprint(tmp_path) == fingerprint(tiny_model)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint(tmp_path) != fingerprint(tiny_model)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        fingerprint(tmp_path)


def test_the_longest_response_fits_the_context(tiny_model: Path) -> None:
    """The tiny model has 256 positions."""
    sets = [PreparedSet(SETS["amc"], "x", (Prompt("q", (1,) * 56, "", ""),), {})]
    assert response_limit(tiny_model, sets, None) == 200 == response_limit(tiny_model, sets, 200)
    assert response_limit(tiny_model, sets, None, default=8) == 8
    with pytest.raises(UserError, match="context is 256 tokens and the longest prompt has 56; at most 200"):
        response_limit(tiny_model, sets, 201)
