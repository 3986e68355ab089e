"""Whole runs whose swaps take the best of a stage, killed and resumed; and what a run's best is good for.

On recorded rollouts, for evaluations too: an evaluation draws the same samples whatever the weights are, so every score
of a run is equal and the first evaluation of a stage is its best. Which one is best by other scores: tests/trainer.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, often_right
from owpo import lines_of, steps_of, values, write_config
from rank_pool import Ranks
from test_resume import Interrupted, assert_same_end, checkpoint, resumed_at
from warm import train, train_all

from owpo_megatron.config import Config

STAGES: dict[str, Any] = {
    # ten steps in stages of 4, 4 and 2, evaluated after steps 2, 4, 6, 8 and 10: the bests are those of 2 and 6
    "reference": {"refresh": "best_of_stage", "every": 4},
    "eval": {"every": 2, "before": True, "after": True, "samples": 2, "pass_at": [1], "limit": 6},
    "checkpoint": {"every": 0, "keep": 20, "keep_best": True},
}


def record_evaluation(config: Config, folder: Path) -> None:
    """The samples of the run's evaluations beside its recorded rollouts, drawn by a fake engine."""
    from owpo_megatron.data import load_tokenizer
    from owpo_megatron.data.tasks import get_task
    from owpo_megatron.engine import rollouts_path, save_rollouts
    from owpo_megatron.evaluation.draw import Answering
    from owpo_megatron.trainer.evaluate import Evaluator, prepare_sets
    from owpo_megatron.verifiers import make_verifier

    tokenizer = load_tokenizer(config.model.path)
    symbols = get_task(config.data.source.removeprefix("task:")).alphabet
    drawn: list[Any] = []

    class Recording(FakeEngine):
        def generate(self, *args: Any, **options: Any) -> list[Any]:
            drawn.extend(rollouts := super().generate(*args, **options))
            return rollouts

    rule, today = config.verifier.rule, datetime.date.today()
    sets = prepare_sets(config.eval, config.data, rule, config.seed, tokenizer, today, lambda _: None)
    rules = {domain: rule for one in sets for domain, rule in one.rules.items()}
    verifier = make_verifier(config.verifier, set(rules), rules)
    engine = Recording(often_right(tokenizer.encode, tokenizer.eos_ids[0], symbols))
    limit = config.rollout.max_response_tokens
    answering = Answering(engine, verifier, tokenizer.decode, tokenizer.eos_ids, limit, config.seed)
    Evaluator(sets, answering, folder / "eval").run("evaluation")
    verifier.close()
    save_rollouts(rollouts_path(folder, 999999), drawn)


@pytest.fixture(scope="module")
def staged(recorded: dict[str, Any]) -> dict[str, Any]:
    sections = recorded | STAGES
    record_evaluation(Config.build(sections), Path(recorded["rollout"]["replay"]))
    return sections


@pytest.fixture(scope="module")
def straight(ranks: Ranks, staged: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ten steps on two tensor-parallel ranks without interruption."""
    here = tmp_path_factory.mktemp("stages")
    config = write_config(here / "run.yaml", staged, {"name": "stages", "parallel": {"tp": 2}})
    train(ranks, config)
    return Path(staged["runs_dir"]) / "stages"


def test_every_stage_ends_in_a_swap_to_its_best_and_starts_anew(straight: Path) -> None:
    steps = steps_of(straight)
    assert values(steps, "ref_id") == [0] * 4 + [1] * 4 + [2] * 2
    assert values(steps, "ref_step") == [0] * 4 + [2] * 4 + [6] * 2
    assert values(steps, "n_active") == [4, 3, 2, 1, 4, 3, 2, 1, 4, 1]
    assert steps[4]["abs_delta"] > 0, "the reference is the policy of two steps before, not the present one"
    evaluations = [line for line in lines_of(straight) if "eval" in line]
    assert values(evaluations, "step") == [0, 2, 4, 6, 8, 10]
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["reference"] == {"ref_id": 2, "source_step": 6, "reason": "best_of_stage"}
    assert summary["best"] == {"step": 2, "pass@1": evaluations[1]["eval"]["pass@1"]}
    assert json.loads((straight / "best" / "score.json").read_text()) == summary["best"]


def test_killed_in_a_stage_and_while_keeping_its_best(
    ranks: Ranks, straight: Path, staged: dict[str, Any], tmp_path: Path
) -> None:
    """First between the stage's best and its swap; then while the weights of the next stage's best are written."""
    run = Interrupted(staged, tmp_path, "stages_killed")
    first = run.start_warm(ranks, "checkpoint.every=1")
    first.wait_until(run.when(3), "step 3", timeout=300, every=0.002)
    first.kill()
    second = run.start_warm(ranks, "checkpoint.every=3")
    writing = run.run_dir / "weights" / ".writing_000006"
    second.wait_until(writing.exists, "writing of the weights after step 6", timeout=300, every=0.001)
    second.kill()
    assert resumed_at(second)[0] in (3, 4)
    third = run.start_warm(ranks)
    third.done(timeout=300)
    assert resumed_at(third)[0] in (3, 4)
    assert checkpoint(run.run_dir, 3)["best"]["stage"] == {
        "step": 2,
        "score": checkpoint(run.run_dir, 3)["best"]["run"]["score"],
    }
    assert_same_end(run.run_dir, straight)
    assert sorted(path.name for path in (run.run_dir / "weights").iterdir()) == ["step_000002", "step_000010"]
    assert [first.survivors(), second.survivors(), third.survivors()] == [[], [], []]


def test_two_stages_a_teacher_and_a_restart(ranks: Ranks, staged: dict[str, Any], tmp_path: Path) -> None:
    """DAPO keeps its best; OWPO takes that as its fixed reference, MOPD as its teacher; the last run starts each stage
    from its reference."""
    runs = Path(staged["runs_dir"])
    quiet: dict[str, Any] = {"checkpoint": {"every": 0, "export_hf": False, "keep_best": False}}
    dapo = {"name": "stages_dapo", "algorithm": {"name": "dapo"}, "optimizer": {"steps": 4}}
    dapo |= {"checkpoint": quiet["checkpoint"] | {"keep_best": True}}
    fixed = {"name": "stages_fixed", "optimizer": {"steps": 1}, "eval": {"every": 0, "before": False, "after": False}}
    fixed |= {"reference": {"refresh": "fixed", "path": str(runs / "stages_dapo" / "best")}}
    taught = {"name": "stages_taught", "algorithm": {"name": "mopd"}, "optimizer": {"steps": 1}, "eval": fixed["eval"]}
    taught |= {"reference": {"refresh": "fixed"}}
    taught |= {"teachers": [{"name": "dapo", "domains": ["cipher"], "path": str(runs / "stages_dapo" / "best")}]}
    restart = {"name": "stages_restart", "reference": {"restart_policy": True, "every": 2}, "optimizer": {"steps": 4}}
    files = [
        write_config(tmp_path / f"{layer['name']}.yaml", staged, quiet, layer)
        for layer in (dapo, fixed, taught, restart)
    ]
    train_all(ranks, files)
    assert json.loads((runs / "stages_dapo" / "summary.json").read_text())["best"]["step"] == 2
    (line,) = steps_of(runs / "stages_fixed")
    assert line["abs_delta"] > 0 and line["w_mean"] != 1.0, "the reference is another policy from the first step on"
    summary = json.loads((runs / "stages_fixed" / "summary.json").read_text())
    assert summary["reference"] == {"ref_id": 0, "source_step": 0, "reason": "loaded"} and summary["best"] is None
    (lesson,) = steps_of(runs / "stages_taught")
    assert lesson["abs_delta"] > 0 and lesson["ref_id"] == 0 and lesson["kl_ref"] != line["kl_ref"]
    kept = json.loads((runs / "stages_taught" / "checkpoints" / "step_000001" / "trainer.json").read_text())
    assert list(kept["reference"]["teachers"]) == ["dapo"] and len(kept["reference"]["teachers"]["dapo"]) == 64
    lr = values(steps_of(runs / "stages_restart"), "lr")
    assert lr[2:] == lr[:2] and lr[0] < lr[1], "the warm-up starts over with each stage"
    assert values(steps_of(runs / "stages_restart"), "ref_step") == [0, 0, 2, 2]
