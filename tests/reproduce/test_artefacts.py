"""The paper's tables and figures as data: layouts as published, runs shared, references as in the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_models import SHAPES

from owpo_megatron.errors import UserError
from owpo_megatron.methods import catalogue, make_method
from owpo_megatron.plan import make_plan
from owpo_megatron.report.published import FILE, published
from owpo_megatron.report.reproduction import figure_notes
from owpo_megatron.reproduce.artefacts import ARTEFACTS, DAPO, artefact
from owpo_megatron.reproduce.estimate import estimate, evaluation_steps
from owpo_megatron.reproduce.execute import Reproduction, table_of
from owpo_megatron.reproduce.recipe import PRESETS, Recipe, cpu_recipe, paper_recipe, preset
from owpo_megatron.reproduce.runs import dapo_of, rows_of

FOLDERS = {"qwen2.5-math-7b": "Qwen2.5-Math-7B", "qwen3-8b-base": "Qwen3-8B-Base"}
Make = Callable[..., Reproduction]


def model_folder(tmp_path: Path, recipe: str = "qwen2.5-math-7b") -> Path:
    """A model's folder with its config.json and nothing else."""
    folder = tmp_path / FOLDERS[recipe]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[recipe]))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A reproduction at one of the two scales."""
    model = model_folder(tmp_path)

    def made(name: str, scale: str = "paper", chosen: str = "paper", *overrides: str) -> Reproduction:
        if scale == "cpu":
            recipe = cpu_recipe(model, preset(chosen), overrides, tmp_path / "sets")
        else:
            recipe = paper_recipe(model, preset(chosen), overrides, None)
        return Reproduction(artefact(name), recipe, [1], tmp_path / "runs")

    return made


def test_all_nine_are_there() -> None:
    wanted = [f"table{number}" for number in range(2, 7)] + [f"figure{number}" for number in range(3, 7)]
    assert sorted(ARTEFACTS) == sorted([*wanted, "reversals"])
    with pytest.raises(UserError, match="artefact = table1: use one of table2, "):
        artefact("table1")


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5", "table6"])
def test_tables_have_the_papers_rows_and_columns(name: str) -> None:
    """Against published.json. Table 3's checkpoint is not stated there and the best here."""
    wanted = json.loads(FILE.read_text())["tables"][name]
    places = [[*cell[:2], "best" if cell[2] == "not stated" else cell[2]] for cell in wanted["columns"]]
    assert [list(cell) for cell in ARTEFACTS[name].columns] == places
    rows = next(iter(wanted["rows"].values()))
    assert [entry.label for entry in ARTEFACTS[name].entries] == list(rows)


def test_every_reference_is_a_checkpoint_of_the_dapo_row(make: Make) -> None:
    """Section 5.1: the best one; 5.3 and 5.4: the suboptimal one. DAPO is trained once."""
    for name, weights in (("table2", "best"), ("table4", "best"), ("figure5", "reached"), ("figure6", "reached")):
        made = make(name)
        dapo = dapo_of(made.recipe, 1)
        guided = [run for row in made.rows for run in row.runs.values() if run.reference is not None]
        assert guided and {run.reference.key for run in guided if run.reference} == {dapo.key}
        assert {run.weights for run in guided} == {weights}
        assert sum(run.config.algorithm.name == "dapo" for run in made.runs) == 1
    assert dapo.config.checkpoint.keep_at_score == 0.30 and dapo.config.checkpoint.keep_best


def test_runs_are_shared_between_tables(make: Make) -> None:
    """Six runs for Tables 2, 3, 5, 6 and Figure 4; two of Table 4's nine rows are among them."""
    keys = {name: {run.key for run in make(name).runs} for name in ARTEFACTS}
    assert keys["table2"] == keys["table3"] == keys["table5"] == keys["table6"] and len(keys["table2"]) == 6
    assert keys["figure4"] < keys["table2"]
    assert len(keys["table4"]) == 10 and len(keys["table4"] & keys["table2"]) == 3  # DAPO, beta 1e-3, alpha 5
    assert len(keys["figure5"]) == 3 and len(keys["figure6"]) == 5
    assert len(set().union(*keys.values())) == 6 + 7 + 2 + 4


def test_stages_are_the_papers(make: Make) -> None:
    """Figure 5: OWPO four iterations, MOPD six, of 80 steps each; the base model is the initial policy."""
    runs = {row.entry.label: row.runs[1] for row in make("figure5").rows}
    assert {label: run.config.optimizer.steps for label, run in runs.items()} == {"mopd": 480, "owpo": 320}
    for run in runs.values():
        assert (run.config.reference.refresh, run.config.reference.every) == ("best_of_stage", 80)
        assert run.start is None
    single = make("figure6").rows[0].runs[1].config
    assert (single.reference.refresh, single.optimizer.steps) == ("fixed", 400)


def test_the_preset_is_the_literal_reading(make: Make) -> None:
    literal, own = (make("table2", "paper", name) for name in PRESETS)
    for row in literal.rows:
        config = row.runs[1].config
        assert config.rollout.dynamic_sampling is True and config.optimizer.beta2 == 0.999
        assert config.optimizer.warmup_steps == 160 and config.data.leave_out == ["repeated"]
        assert config.eval.instruction == "dapo"
    literal_penalty, own_penalty = (
        next(row.runs[1].config.algorithm.settings() for row in made.rows if row.entry.method == "sym_dapo")
        for made in (literal, own)
    )
    assert literal_penalty["penalty"] == "k2" and "penalty" not in own_penalty
    assert own.rows[0].runs[1].config.rollout.dynamic_sampling is None
    with pytest.raises(UserError, match="--preset = literal: use one of paper, recommended"):
        preset("literal")


def test_presets_name_real_methods_and_fields(make: Make) -> None:
    """Every method of a preset gets its fields, also those of no table."""
    for name in PRESETS:
        assert set(preset(name).methods) <= set(catalogue())
        for artefact_name in ("table2", "figure6"):
            for scale in ("paper", "cpu"):
                assert make(artefact_name, scale, name).runs


def test_overrides_reach_every_run(make: Make) -> None:
    made = make("table2", "cpu", "paper", "optimizer.steps=7", "eval.every=3")
    assert {run.config.optimizer.steps for run in made.runs} == {7}
    with pytest.raises(UserError, match=r"optimizer.stpes = 7: unknown field; did you mean steps"):
        make("table2", "cpu", "paper", "optimizer.stpes=7")


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [("penalty", "k3", "sym_dapo"), ("weight_policy", "old", "owpo"), ("vocabulary", "full", "opd")],
)
def test_a_switch_of_some_methods_reaches_these(make: Make, name: str, value: str, changed: str) -> None:
    """Readings 7, 2 and 16: methods without the hyper-parameter, or with this value, have the same run as before."""
    before, after = make("table2"), make("table2", "paper", "paper", f"algorithm.{name}={value}")
    for old, new in zip(before.rows, after.rows, strict=True):
        method = make_method(new.runs[1].config.algorithm)
        assert getattr(method, name, value) == value
        assert (old.runs[1].key != new.runs[1].key) is (method.name == changed)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("table2", "algorithm.asymmetry=log_ratio", "no method of table2 has it"),
        ("table4", "algorithm.beta=0.5", "each row of table4 has its own"),
        ("table2", "seed=3", "use --seeds"),
        ("figure6", "reference.refresh=interval", "each run has its own: fixed, or the best of each stage"),
        ("table2", "runs_dir=/elsewhere", "choose the folder with --out"),
    ],
)
def test_a_change_that_would_reach_no_run_is_refused(make: Make, name: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as mistake:
        make(name, "cpu", "paper", override)
    assert mistake.value.field == override.partition("=")[0]


def test_stages_and_the_prior_can_be_changed(make: Make) -> None:
    """Reading 14; a prior that was never reached is lowered by the field that the message names."""
    made = make("figure5", "cpu", "paper", "reference.every=5", "checkpoint.keep_at_score=0.2")
    runs = {row.entry.label: row.runs[1] for row in made.rows}
    assert {label: run.config.optimizer.steps for label, run in runs.items()} == {"mopd": 30, "owpo": 20}
    assert made.recipe.stage_steps == 5 and dapo_of(made.recipe, 1).config.checkpoint.keep_at_score == 0.2
    assert {run.config.checkpoint.keep_at_score for run in runs.values()} == {None}


def test_stand_ins_are_different_problems(make: Make, tmp_path: Path) -> None:
    recipe = make("table2", "cpu").recipe
    files = {name: Path(str(one.source)).read_text().splitlines() for name, one in recipe.sets.items()}
    assert {name: len(lines) for name, lines in files.items()} == {
        "aime24": 32, "aime25": 32, "amc": 48, "gpqa": 32, "mmlu_pro": 32
    }  # fmt: skip
    everything = [line for lines in files.values() for line in lines]
    assert len(set(everything)) == len(everything)


def test_the_estimate_counts_steps_and_evaluations(make: Make) -> None:
    """Qwen2.5: 400 steps, an evaluation every 20, one before, 21 in all. Table 2 adds two sets at two checkpoints."""
    found = estimate(make("table2"), "H100", 80 << 30)
    assert [one.steps for one in found.runs] == [400] * 6 and {one.evaluations for one in found.runs} == {21}
    assert found.evaluations == [("AIME25", 12, 30 * 32), ("AMC", 12, 83 * 32)]
    assert all(one.fits and one.gib and one.hours and one.hours > 0 for one in found.runs)
    references = {one.label: one.reference for one in found.runs}
    assert references["owpo-s1"] == "best of dapo-s1" and references["dapo-s1"] == "none"
    assert any("6 runs, 6 to train: 2,400 steps" in line for line in found.lines)
    on_cpu = estimate(make("table3", "cpu"), "H100", 80 << 30)
    assert {one.hours for one in on_cpu.runs} == {None} and on_cpu.evaluations[0][1:] == (6, 32 * 8)
    with pytest.raises(UserError, match="--gpu = H900"):
        estimate(make("table2"), "H900", 80 << 30)


@pytest.mark.parametrize("name", [one.name for one in ARTEFACTS.values() if one.entries])
def test_every_estimate_has_memory_and_hours(make: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run's steps, evaluations, memory and GPU hours at the paper's scale, and their sums.

    The plan of one run stands for all: that plans differ by method is tested in tests/plan.
    """
    made = make(name)
    plan = make_plan(made.runs[-1].config, 80 << 30)
    monkeypatch.setattr("owpo_megatron.reproduce.estimate.make_plan", lambda *_, **__: plan)
    found = estimate(made, "H100", 80 << 30)
    assert [one.label for one in found.runs] == [run.label for run in made.runs]
    assert all(one.steps >= 320 and one.evaluations > 16 and one.gib and one.hours for one in found.runs)
    steps = f"{sum(one.steps for one in found.runs):,} steps"
    assert steps in found.lines[0] and "GPU hours, a rough estimate" in found.lines[2]
    others = {"table2": 2, "table3": 2, "table5": 2, "table6": 2, "figure6": 1}
    assert len(found.evaluations) == others.get(name, 0)


def test_evaluations_of_a_staged_run(make: Make) -> None:
    config = make("figure5", "cpu").rows[1].runs[1].config  # 4 stages of 6 steps, every 4 steps
    assert evaluation_steps(config) == [0, 4, 6, 8, 12, 16, 18, 20, 24]


def test_a_table_is_laid_out_from_the_values_of_its_seeds() -> None:
    """Means over seeds, in percent; the average over the sets of one metric and checkpoint."""
    columns = [["aime24", "pass@1", "best"], ["amc", "pass@1", "best"], ["average", "pass@1", "best"]]
    result: dict[str, Any] = {
        "kind": "table", "title": "t", "model": "m", "rows": ["owpo"], "columns": columns,
        "titles": {"aime24": "AIME24", "amc": "AMC"},
        "values": [["owpo", "aime24", "pass@1", "best", [0.2, 0.4]], ["owpo", "amc", "pass@1", "best", [0.6, 0.6]]],
    }  # fmt: skip
    table = table_of(result)
    assert table.columns == [("AIME24", "best"), ("AMC", "best"), ("Average", "best")]
    assert table.cells == [[pytest.approx(30.0), pytest.approx(60.0), pytest.approx(45.0)]]
    assert table.markdown().splitlines()[-1] == "| m | owpo | 30.00 | 60.00 | 45.00 |"


def figure_result(name: str, reference: dict[str, float], values: dict[tuple[str, str], float]) -> dict[str, Any]:
    columns = [[place, "pass@1", "best"] for place in reference]
    return {
        "name": name, "kind": ARTEFACTS[name].kind, "rows": list(dict.fromkeys(label for label, _ in values)),
        "titles": {place: place.upper() for place in reference}, "columns": columns, "reference": reference,
        "values": [[label, place, "pass@1", "best", [value]] for (label, place), value in values.items()],
    }  # fmt: skip


def test_what_the_paper_says_of_a_figure_stands_beside_it() -> None:
    """Figures 5 and 6 have other runs than its tables: their rows are not compared with those of Table 2."""
    stages = figure_result("figure5", {"aime24": 0.3}, {("mopd", "aime24"): 0.36, ("owpo", "aime24"): 0.41})
    assert figure_notes(stages, "Qwen2.5-Math-7B") == [
        "in the paper from 30.0 (here 30.00): MOPD about 37 in 6 iterations (here 36.00), "
        "OWPO about 40 in 4 iterations (here 41.00)"
    ]
    assert figure_notes(stages, "Qwen3-8B-Base") == ["the paper has this figure for Qwen2.5-Math-7B alone"]
    scores = {("owpo", "aime24"): 0.4, ("owpo", "aime25"): 0.2, ("w/o Asym", "aime25"): 0.17}
    bars = figure_result("figure6", {"aime24": 0.3, "aime25": 0.16}, scores)
    assert figure_notes(bars, "Qwen2.5-Math-7B") == [
        "gain on AIME25 over the reference, in the paper: OWPO +3.8 (here +4.00), w/o Asym +0.9 (here +1.00)"
    ]
    curves = figure_result("figure4", {"aime24": 0.35}, {("owpo", "aime24"): 0.4})
    assert figure_notes(curves, "Qwen3-8B-Base") == [
        "the paper's reference has 37.19, its model is not stated; here 35.00"
    ]


def test_the_second_model_has_its_own_recipe(tmp_path: Path) -> None:
    recipe: Recipe = paper_recipe(model_folder(tmp_path, "qwen3-8b-base"), preset("paper"), (), None)
    assert recipe.run.rollout.max_response_tokens == 20480 and recipe.model == "Qwen3-8B-Base"
    assert rows_of(artefact("table2"), recipe, [1, 2])[0].runs.keys() == {1, 2}
    assert DAPO.method in {one.method for one in published()}
