"""The paper's numbers in published.json: complete, consistent where the paper is, and found by what a user has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from owpo_megatron.cli import evaluating
from owpo_megatron.cli.protocol import _paper
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.protocols import TwoStage
from owpo_megatron.report.published import errata, figure, find_published, method_of, paper_model, published
from owpo_megatron.report.scores import Scored, beside_paper, score_tables

MODELS = ("Qwen2.5-Math-7B", "Qwen3-8B-Base")
METHODS = ("grpo", "dapo", "sym_dapo", "mopd", "opd", "owpo")


def percent(table: str, model: str, method: str, set: str, metric: str, checkpoint: str) -> float:
    wanted = (table, model, method, set, metric, checkpoint)
    (found,) = (one.percent for one in published() if tuple(vars(one).values())[:6] == wanted)
    return found


def test_every_table_is_there() -> None:
    """Tables 2, 5 and 6 have 2 x 6 x 8 numbers, Table 3 2 x 6 x 2, Table 4 9 x 2."""
    counts = {name: sum(one.table == name for one in published()) for name in ("table2", "table5", "table6")}
    assert counts == {"table2": 96, "table5": 96, "table6": 96}
    assert [sum(one.table == name for one in published()) for name in ("table3", "table4")] == [24, 18]


@pytest.mark.parametrize("table", ["table2", "table5", "table6"])
def test_averages_are_those_of_the_three_sets(table: str) -> None:
    """Within 0.011: the paper rounds. A typing error in any number would show here."""
    for model in MODELS:
        for method in METHODS:
            cells = [one for one in published() if (one.table, one.model, one.method) == (table, model, method)]
            for metric, place in {(one.metric, one.checkpoint) for one in cells}:
                by_set = {one.set: one.percent for one in cells if (one.metric, one.checkpoint) == (metric, place)}
                average = by_set.pop("average")
                assert sum(by_set.values()) / 3 == pytest.approx(average, abs=0.011), (model, method, metric, place)


def test_tables_agree_but_for_the_erratum() -> None:
    """Table 2 against 5 and 6, number by number: DAPO's converged AIME25 of Qwen2.5 (and so its average) differs."""
    different = []
    for one in published():
        if one.table in ("table5", "table6") and one.metric == "pass@1":
            same = percent("table2", one.model, one.method, one.set, one.metric, one.checkpoint)
            if same != one.percent:
                different.append((one.model, one.method, one.set, one.checkpoint, same, one.percent))
    assert different == [
        ("Qwen2.5-Math-7B", "dapo", "aime25", "converged", 18.75, 17.29),
        ("Qwen2.5-Math-7B", "dapo", "average", "converged", 42.83, 42.34),
    ]
    assert any("18.75 in Table 2" in text for text in errata("table6")) and len(errata()) == 6


def test_the_chosen_rows_of_table_4_are_the_best_checkpoints_of_table_5() -> None:
    for row, method in (("sym_dapo, beta 0.001", "sym_dapo"), ("mopd, alpha 5", "mopd")):
        for metric in ("pass@1", "pass@16"):
            chosen = percent("table4", MODELS[0], row, "aime24", metric, "best")
            assert chosen == percent("table5", MODELS[0], method, "aime24", metric, "best")


def test_gains_that_the_text_states_otherwise() -> None:
    def gain(model: str, method: str, set: str) -> float:
        ours, dapo = (percent("table2", model, one, set, "pass@1", "best") for one in (method, "dapo"))
        return round(ours - dapo, 2)

    assert [gain(model, "mopd", "average") for model in MODELS] == [0.55, 1.09]
    assert [gain(model, "owpo", "average") for model in MODELS] == [3.35, 6.59]
    assert [gain(model, "owpo", "aime24") for model in MODELS] == [4.48, 7.71]
    assert (gain(MODELS[0], "opd", "aime24"), gain(MODELS[1], "mopd", "aime24")) == (0.93, 1.13)


def test_a_number_is_found_with_its_checkpoint() -> None:
    """42.19 is the converged checkpoint's, 44.38 the best one's: a comparison without it would mix them."""
    for place, value in (("best", 44.38), ("converged", 42.19)):
        found = find_published("Qwen3-8B-Base", "owpo", "aime24", "pass@1", place)
        assert found is not None and found.percent == value
    science = find_published("Qwen3-8B-Base", "owpo", "gpqa", "pass@1", "best")
    assert science is not None and science.percent == 54.55
    assert find_published("Qwen3-8B-Base", "owpo", "gpqa", "pass@1", "converged") is None
    assert figure("figure5")["owpo"] == {"iterations": 4, "percent": 40.0}


@pytest.mark.parametrize(
    ("folder", "model"),
    [("Qwen2.5-Math-7B", MODELS[0]), ("qwen2_5_math_7b_32k", MODELS[0]), ("Qwen3-8B-Base", MODELS[1])],
)
def test_the_model_is_told_by_its_folder(folder: str, model: str) -> None:
    assert paper_model(folder) == model


def test_another_model_has_to_be_named() -> None:
    assert paper_model("final", "qwen3-8b-base") == MODELS[1]
    with pytest.raises(UserError, match=r"model = Qwen3-4B: the paper has .*; choose one: --paper-model"):
        paper_model("Qwen3-4B")
    with pytest.raises(UserError, match="--paper-model = Llama"):
        paper_model("Qwen3-8B-Base", "Llama")


def test_methods_in_labels() -> None:
    assert method_of("owpo (two-stage-owpo-s1)") == "owpo" and method_of("owpo_no_asym (x)") is None


def test_the_papers_rows_and_the_differences_stand_below_ones_own() -> None:
    def scores(value: float) -> dict[str, object]:
        metrics = {name: {"value": value, "low": value, "high": value} for name in ("pass@1", "pass@16")}
        return {"title": "AIME24", "metrics": metrics}

    mine = [
        Scored("Qwen3-8B-Base", method, place, {"aime24": scores(value)})
        for method, place, value in (
            ("owpo (mine)", "best", 0.40),
            ("owpo (mine)", "converged", 0.41),
            ("x", "best", 0.1),
        )
    ]
    table = beside_paper(score_tables(mine)[0], {"Qwen3-8B-Base": "Qwen3-8B-Base"})
    assert [row for _, row in table.rows] == ["owpo (mine)", "  paper: owpo", "  difference", "x"]
    assert table.cells[1] == [44.38, 42.19]
    assert table.cells[2] == [pytest.approx(40 - 44.38), pytest.approx(41 - 42.19)]


def test_owpo_eval_shows_the_papers_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Covers what `--beside paper` prints at the end of an evaluation, and writes to table.json."""
    metrics = {"pass@1": {"value": 0.4, "low": 0.3, "high": 0.5}}
    sizes = {"problems": 30, "samples": 32, "response_length": 700.0, "truncated_share": 0.1}
    scored = [Scored("base", "owpo (mine)", "best", {"aime24": {"title": "AIME24", "metrics": metrics, **sizes}})]
    evaluating._show(scored, tmp_path, None, {"base": "Qwen3-8B-Base"})
    printed = capsys.readouterr().out
    assert "paper: owpo" in printed and "44.38" in printed and "-4.38" in printed
    assert [row[1] for row in json.loads((tmp_path / "table.json").read_text())["tables"][0]["rows"]][1:] == [
        "  paper: owpo",
        "  difference",
    ]


def test_a_protocol_is_compared_on_a_set_of_the_papers() -> None:
    run = {"model": {"path": "models/Qwen3-8B-Base"}, "data": {"source": "task:cipher"}, "eval": {"every": 5}}
    lab = TwoStage(run=run | {"eval": {"every": 5, "sets": ["aime24"]}}).lab()
    assert _paper(lab, None) == ("Qwen3-8B-Base", "aime24")
    with pytest.raises(UserError, match="--beside = paper: the paper has no scores on held_out; it has aime24, aime25"):
        _paper(TwoStage(run=run).lab(), None)
