"""Runs of a comparison, and when two of them are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from owpo_megatron.errors import UserError
from owpo_megatron.experiments import compare
from owpo_megatron.experiments.compare import Cell, plan, specs_of
from owpo_megatron.experiments.lab import Lab, load_section
from owpo_megatron.experiments.outcome import Outcome
from owpo_megatron.experiments.pool import with_needs
from owpo_megatron.experiments.protocols import SelfEvolution, TwoStage
from owpo_megatron.experiments.spec import RunSpec, model_digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A lab of two methods, two seeds and two regimes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    raw: dict[str, Any] = {
        "run": {
            "model": {"path": str(tmp_path / "model")},
            "data": {"source": "task:cipher"},
            "rollout": {"prompts_per_step": 16},
            "optimizer": {"steps": 30},
            "eval": {"every": 5},
        },
        "methods": ["owpo", "dapo"],
        "seeds": [1, 2],
        "regimes": {"flipped": {"set": {"verifier.flip": 0.15}}, "clean": {}},
    }
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "lab.yaml"


def cells_of(file: Path, *overrides: str) -> dict[tuple[str, str, int], Cell]:
    return {(cell.setting, cell.arm.label, cell.seed): cell for cell in plan(Lab.load(file, overrides))}


def test_guided_methods_get_the_reference_of_their_seed_and_others_its_steps(file: Path) -> None:
    cells = cells_of(file)
    owpo, dapo = cells["flipped", "owpo", 2], cells["flipped", "dapo", 2]
    assert owpo.run.reference is not None and owpo.run.config.reference.refresh == "fixed"
    assert owpo.run.reference.config.seed == 1002 and owpo.run.reference.config.optimizer.steps == 10
    assert owpo.longer is None
    assert dapo.run.reference is None
    assert dapo.longer is not None and dapo.longer.config.optimizer.steps == 40


def test_the_reference_never_sees_the_noise_of_a_regime_and_is_made_once(file: Path) -> None:
    cells = cells_of(file)
    noisy, clean = cells["flipped", "owpo", 1].run, cells["clean", "owpo", 1].run
    assert noisy.config.verifier.flip == 0.15 and clean.config.verifier.flip == 0.0
    assert noisy.reference is not None and clean.reference is not None
    assert noisy.reference.config.verifier.flip == 0.0
    assert noisy.reference.key == clean.reference.key
    runs = with_needs(specs_of(list(cells.values())))
    # 2 settings x 2 seeds x (owpo, dapo, longer dapo), and one reference per seed, each before the runs that need it
    assert len(runs) == 14
    keys = [spec.key for spec in runs]
    assert all(keys.index(needed.key) < keys.index(spec.key) for spec in runs for needed in spec.needs)


@pytest.mark.slow
def test_the_key_holds_what_changes_the_result_and_nothing_else(file: Path) -> None:
    def key(*overrides: str) -> str:
        return cells_of(file, *overrides)["clean", "owpo", 1].run.key

    assert key() == key("run.engine.concurrency=8") == key("out_dir=elsewhere") == key("name=other")
    assert key() == key("run.optimizer.beta2=0.95")  # a default that is spelled out
    for change in ("run.optimizer.lr=1e-4", "reference.steps=11", "reference.weights=best"):
        assert key() != key(change), change
    before = key()
    (file.parent / "model" / "config.json").write_text('{"hidden_size": 4}')
    model_digest.cache_clear()
    assert key() != before


def test_a_run_made_under_another_label_is_found(file: Path, tmp_path: Path) -> None:
    spec = cells_of(file)["clean", "owpo", 1].run
    root = tmp_path / "runs"
    (root / f"other-label-{spec.key}").mkdir(parents=True)
    assert not spec.is_done(root)
    (root / f"other-label-{spec.key}" / "summary.json").write_text("{}")
    assert spec.is_done(root)
    assert RunSpec("again", spec.config, spec.reference).is_done(root)


def test_a_policy_can_start_from_the_reference(file: Path, tmp_path: Path) -> None:
    cells = cells_of(file, "methods=[owpo, {label: continued, method: dapo, start: reference}]")
    run = cells["clean", "continued", 1].run
    assert run.start is not None and run.reference is None
    placed = run.placed(tmp_path / "runs")
    assert placed.model.path == run.start.folder(tmp_path / "runs") / "hf"
    assert cells["clean", "continued", 1].longer is None  # it has spent the reference's steps


def test_two_stage_takes_the_best_of_the_first_stage(file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    del raw["regimes"]
    file.write_text(yaml.safe_dump(raw))
    lab = load_section(TwoStage, file, ["first={steps: 20}"]).lab()
    run = plan(lab)[0].run
    assert run.reference is not None and run.reference.config.checkpoint.keep_best
    assert run.placed(tmp_path / "runs").reference.path == run.reference.folder(tmp_path / "runs") / "best"


def test_self_evolution_swaps_to_the_best_of_every_stage(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    del raw["regimes"]
    file.write_text(yaml.safe_dump(raw))
    lab = load_section(SelfEvolution, file, ["iterations=3", "stage_steps=10", "prior={steps: 5}"]).lab()
    config = plan(lab)[0].run.config
    assert (config.reference.refresh, config.reference.every, config.optimizer.steps) == ("best_of_stage", 10, 30)


def protocol_file(file: Path, **changes: Any) -> Path:
    raw = yaml.safe_load(file.read_text())
    del raw["regimes"]
    file.write_text(yaml.safe_dump(raw | changes))
    return file


def test_a_method_may_have_iterations_of_its_own(file: Path) -> None:
    methods = [{"label": "owpo", "method": "owpo"}, {"label": "mopd", "method": "mopd", "iterations": 6}]
    settings = load_section(SelfEvolution, protocol_file(file, methods=methods), ["iterations=4", "stage_steps=10"])
    steps = {cell.arm.label: cell.run.config.optimizer.steps for cell in plan(settings.lab())}
    assert steps == {"owpo": 40, "mopd": 60} and settings.most_iterations == 6


@pytest.mark.parametrize(
    ("fields", "score"), [({"weights": "best"}, 0.3719), ({"weights": "final"}, 0.3188), ({"at_score": 0.3}, 0.31)]
)
def test_the_score_of_the_reference_is_that_of_the_weights_that_are_used(
    file: Path, fields: dict[str, Any], score: float
) -> None:
    """The paper's DAPO ends below its best: tables and dashed lines show the checkpoint that the methods refer to."""
    lab = Lab.load(file, [])
    assert lab.reference is not None
    used = lab.model_copy(update={"reference": lab.reference.model_copy(update=fields)})
    curve = ((0, 0.1), (20, 0.31), (40, 0.3719), (60, 0.3188))
    assert compare._used(used, Outcome(curve, curve, 0.0, 0, 0.0, {})) == score


def test_a_prior_can_be_asked_for_by_its_score(file: Path, tmp_path: Path) -> None:
    """The paper's suboptimal reference is the DAPO checkpoint at 30.0 % of AIME24, not one after so many steps."""
    lab = load_section(SelfEvolution, protocol_file(file), ["prior={steps: 50, at_score: 0.3}", "methods=[owpo]"]).lab()
    run, root = plan(lab)[0].run, tmp_path / "runs"
    assert run.reference is not None and run.reference.config.checkpoint.keep_at_score == 0.3
    assert run.placed(root).reference.path == run.reference.folder(root) / "reached"
    prior = run.reference.folder(root)
    prior.mkdir(parents=True)
    (prior / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint.keep_at_score = 0.3: .* never had this Pass@1; lower it"):
        run.placed(root)


def test_a_table_is_written_where_the_prior_never_reached_its_score(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failures have the reason and the remedy; the table has no reference."""
    lab = load_section(SelfEvolution, protocol_file(file), ["prior={steps: 50, at_score: 0.3}", "methods=[owpo]"]).lab()
    cells, curve = plan(lab), ((0, 0.1), (50, 0.2))
    lab = lab.model_copy(update={"out_dir": tmp_path / "runs"})
    for one in cells[0].run.needs:
        one.folder(lab.root).mkdir(parents=True)
        (one.folder(lab.root) / "summary.json").write_text("{}")
    monkeypatch.setattr(compare, "read_outcome", lambda folder, metric: Outcome(curve, curve, 0.0, 0, 0.0, {}))
    table = compare.write_table(lab, cells)["regimes"]["self-evolution"]
    assert table["reference_used"] is None and table["reference_best"]["mean"] == 0.2 and table["entries"] == []


def test_runs_at_equal_compute_can_be_left_out(file: Path) -> None:
    assert any(cell.longer for cell in cells_of(file).values())
    assert not any(cell.longer for cell in cells_of(file, "equal_compute=false").values())
    lab = load_section(TwoStage, protocol_file(file), ["equal_compute=false", "methods=[owpo, dapo]"]).lab()
    assert not any(cell.longer for cell in plan(lab))


def test_dapo_is_trained_once_where_it_is_the_reference(file: Path) -> None:
    """The paper's reference is its DAPO row: with the same seed both are one run."""
    overrides = ["first={seed_offset: 0, steps: 30}", "methods=[owpo, dapo]", "equal_compute=false", "seeds=[1]"]
    overrides += ["run.checkpoint={keep_best: true, export_hf: false}"]
    lab = load_section(TwoStage, protocol_file(file), overrides).lab()
    assert len(with_needs(specs_of(plan(lab)))) == 2


@pytest.mark.parametrize("kind", [TwoStage, SelfEvolution])
def test_the_metric_is_one_of_the_primary_set(file: Path, kind: type[TwoStage | SelfEvolution]) -> None:
    """AIME24 has Pass@16 and no Pass@8, whatever `eval.pass_at` says, which is for runs without sets."""
    sets = ["run.eval.sets=[aime24]", "methods=[owpo]"]
    lab = load_section(kind, protocol_file(file), ["metric=pass@16", *sets]).lab()
    assert lab.metric == "pass@16"
    with pytest.raises(UserError) as mistake:
        load_section(kind, file, ["metric=pass@8", *sets]).lab()
    assert str(mistake.value) == "metric = pass@8: the primary evaluation set (AIME24) has pass@1, pass@16"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("methods=[owpo, owpo]", "methods"),
        ("methods=[owqo]", "methods.0.method"),
        ("against=grpo", "against"),
        ("seeds=[1, 1]", "seeds"),
        ("metric=pass@3", "metric"),
        ("run.eval.every=0", "run.eval.every"),
        ("regimes={noisy: {set: {verifier.flop: 0.1}}}", "verifier.flop"),
        ("regimes={noisy: {set: {flip.verifier: 0.1}}}", "set"),
        ("workers=2", "workers"),
    ],
)
def test_mistakes_name_their_field(file: Path, override: str, field: str) -> None:
    overrides = [override] + (["run.engine.urls=['http://127.0.0.1:1']"] if field == "workers" else [])
    with pytest.raises(UserError) as mistake:
        plan(Lab.load(file, overrides))
    assert mistake.value.field == field
