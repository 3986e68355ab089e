"""One step's line, metrics.jsonl over a resume, and summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_config

from owpo_megatron.errors import RunError
from owpo_megatron.run.metrics import MetricsFile, StepLine
from owpo_megatron.run.summary import write_summary
from owpo_megatron.types import Candidate, ReferenceVersion


def sums(**values: Any) -> dict[str, Any]:
    return {"grad_norm": 1.0, "lr": 1e-3, "loss_sum": 0.0, "loss_count": 1.0, "tokens": 1.0} | values


def test_means_are_over_the_tokens_of_all_updates_not_over_updates() -> None:
    line = StepLine(4)
    line.add_update(sums(loss_sum=30.0, loss_count=10.0, w_sum=9.0, tokens=10.0, grad_norm=2.0, lr=1.0))
    line.add_update(sums(loss_sum=2.0, loss_count=2.0, w_sum=3.0, tokens=2.0, grad_norm=4.0, lr=0.5))
    found = line.as_dict()
    assert found["step"] == 5 and found["updates"] == 2
    assert found["loss"] == 32 / 12 and found["w_mean"] == 1.0 and found["tokens"] == 12
    assert found["grad_norm"] == 3.0 and found["lr"] == 0.5


def test_a_methods_own_metrics_are_means_over_tokens() -> None:
    line = StepLine(0)
    line.add_update({"grad_norm": 1.0, "lr": 0.1, "tokens": 4.0, "kept_sum": 1.0, "bins": [2.0, 6.0], "head_rows": 9.0})
    found = line.as_dict()
    assert (found["kept"], found["bins"]) == (0.25, [0.5, 1.5]) and "head_rows" not in found


def test_a_mean_over_nothing_is_left_out() -> None:
    line = StepLine(0)
    line.add_update(sums(kl_ref_sum=0.0, ref_tokens=0.0, w_at_low=0.0, active_tokens=0.0))
    assert not {"kl_ref", "abs_delta", "case_1", "w_at_low"} & line.as_dict().keys()
    assert not {"loss", "grad_norm", "lr", "tokens"} & StepLine(0).as_dict().keys()


def test_histograms_add_up_bin_by_bin() -> None:
    line = StepLine(0)
    line.add_update(sums(delta_hist=[1.0, 2.0]))
    line.add_update(sums(delta_hist=[10.0, 20.0]))
    assert line.as_dict()["delta_hist"] == [11.0, 22.0]


def test_phases_that_run_twice_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 5.0, 9.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    line = StepLine(0)
    for _ in range(2):
        with line.timed("update"):
            pass
    assert line.as_dict()["seconds"] == {"update": 6.0, "total": 10.0}


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_drops_later_lines_and_a_half_written_one(file: MetricsFile, tmp_path: Path) -> None:
    scored = {"step": 2, "eval": {"pass@1": 0.5}}
    for line in ({"step": 0, "eval": {}}, {"step": 1}, {"step": 2}, scored, {"step": 3}):
        file.append(line)
    with (tmp_path / "metrics.jsonl").open("a") as raw:
        raw.write('{"step": 1, "rew')
    file.drop_after(2)
    assert written(tmp_path) == [{"step": 0, "eval": {}}, {"step": 1}, {"step": 2}, scored]
    assert file.evaluation(2) == {"pass@1": 0.5} and file.evaluation(1) is None
    file.append({"step": 3})
    assert written(tmp_path)[-1] == {"step": 3}


@pytest.mark.parametrize("garbage", [b"\xff\x00\n", b"7\n", b"{}\n", b'{"step": "two"}\n', b"\x00" * 40 + b"\n"])
def test_lines_that_are_lost_are_named(garbage: bytes, file: MetricsFile, tmp_path: Path) -> None:
    """A broken disk, a power cut, somebody's hand: the rest is kept, and what is missing is returned."""
    for step in (1, 2, 4):
        file.append({"step": step})
    raw = tmp_path / "metrics.jsonl"
    raw.write_bytes(raw.read_bytes().replace(b'{"step": 2}\n', garbage))
    assert file.drop_after(4) == [2, 3] and [line["step"] for line in written(tmp_path)] == [1, 4]
    raw.unlink()
    assert file.drop_after(2) == [1, 2] and written(tmp_path) == []


def test_a_line_that_only_the_checkpoint_has_is_put_back(file: MetricsFile, tmp_path: Path) -> None:
    """Killed after the checkpoint of a step and before its line."""
    file.append({"step": 0, "eval": {}})
    with pytest.raises(RuntimeError), file.step(0) as line:
        line.add(reward_mean=0.5)
        kept = file.under_way()
        raise RuntimeError("killed here")
    assert written(tmp_path) == [{"step": 0, "eval": {}}]
    file.drop_after(1, kept)
    assert [line["step"] for line in written(tmp_path)] == [0, 1] and written(tmp_path)[1]["reward_mean"] == 0.5
    file.drop_after(1, kept)
    assert len(written(tmp_path)) == 2, "it is written once"


def test_a_line_is_told_and_written_when_its_step_ends(tmp_path: Path) -> None:
    class Told:
        def step(self, line: dict[str, Any]) -> None:
            told.append(line)

        def evaluation(self, step: int, scores: dict[str, Any]) -> None:
            scored.append((step, scores))

    told: list[dict[str, Any]] = []
    scored: list[tuple[int, dict[str, Any]]] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", [Told()])  # type: ignore[list-item]
    with file.step(0) as line:
        line.add(ref_id=1)
        assert told == [] and file.under_way()["ref_id"] == 1
    assert told == written(tmp_path) and told[0]["step"] == 1
    file.append({"step": 1, "eval": {"pass@1": 0.5}})
    assert len(told) == 1 and scored == [(1, {"pass@1": 0.5})]
    assert file.under_way() is None


def test_summary_of_a_run(tmp_path: Path) -> None:
    config = make_config(
        Path("m"), name="r", runs_dir=str(tmp_path), optimizer={"steps": 2, "updates_per_step": 1}, parallel={"tp": 2}
    )
    config.run_dir.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": 0, "eval": {"pass@1": 0.25, "pass@8": 0.5, "problems": 4}},
        {"step": 1, "mismatch": 1e-6, "tokens": 10.0, "seconds": {"total": 1.5}},
        {"step": 1, "eval": {"pass@1": 0.3, "pass@8": 0.6, "problems": 4}},
        {"step": 2, "updates": 2, "mismatch": 3e-6, "tokens": 20.0, "seconds": {"total": 2.0}},
        {"step": 2, "eval": {"pass@1": 0.75, "pass@8": 1.0, "problems": 4}},
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reference = ReferenceVersion(1, 2, "interval", "h")
    write_summary(config, {"name": "sglang", "version": "1"}, reference, swaps=1, best=Candidate(2, 0.75))
    assert json.loads((config.run_dir / "summary.json").read_text()) == {
        "name": "r", "algorithm": "owpo", "steps": 2,
        "pass_at_1_before": 0.25, "pass_at_8_before": 0.5, "pass_at_1_after": 0.75, "pass_at_8_after": 1.0,
        "steps_updated": 1, "swaps": 1, "reference": {"ref_id": 1, "source_step": 2, "reason": "interval"},
        "best": {"step": 2, "pass@1": 0.75},
        "parallel": {"tp": 2, "cp": 1, "pp": 1, "dp": 1, "sp": False}, "engine": {"name": "sglang", "version": "1"},
        "seconds": 3.5, "tokens": 30, "mismatch_max": 3e-6,
    }  # fmt: skip


def test_an_update_that_was_skipped_or_had_nothing_to_count_is_none() -> None:
    line = StepLine(0)
    line.add_update({"grad_norm": 0.0, "lr": 1e-3, "loss_count": 0.0, "skipped": 1})
    line.add_update({"grad_norm": 0.0, "lr": 1e-3, "loss_count": 0.0})
    assert line.as_dict()["updates"] == 0 and line.as_dict()["updates_skipped"] == 1
    line.add_update({"grad_norm": 2.0, "lr": 1e-3, "loss_count": 4.0, "loss_sum": 2.0})
    assert line.as_dict()["updates"] == 1 and line.as_dict()["grad_norm"] == 2.0 and line.as_dict()["loss"] == 0.5


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    nan, infinity = float("nan"), float("inf")
    file.append({"step": 1, "loss": nan, "seconds": {"total": infinity}, "delta_hist": [1.0, -infinity]})
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert found == {"step": 1, "loss": None, "seconds": {"total": None}, "delta_hist": [1.0, None]}


def test_a_run_without_evaluation_or_update_has_a_summary(tmp_path: Path) -> None:
    config = make_config(Path("m"), name="r", runs_dir=str(tmp_path))
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "seconds": {"total": 1.0}}\n')
    summary = write_summary(config, {}, ReferenceVersion(0, 0, "init", ""), swaps=0, best=None)
    assert summary["mismatch_max"] is None and summary["best"] is None and summary["tokens"] == 0
    assert not [name for name in summary if name.startswith("pass_at")]


def test_lines_that_are_none_end_no_run(tmp_path: Path) -> None:
    """Whatever somebody appends: an evaluation is found, and the summary written."""
    config = make_config(tmp_path / "model", name="run", runs_dir=str(tmp_path))
    file = MetricsFile(config.run_dir / "metrics.jsonl")
    file.append({"step": 2, "eval": {"pass@1": 0.5}})
    with (config.run_dir / "metrics.jsonl").open("ab") as other:
        other.write(b'garbage\n{"a": 1}\n\xff\n[3]\n')
    assert file.evaluation(2) == {"pass@1": 0.5} and file.evaluation(3) is None
    file.append({"step": 2, "updates": 1, "seconds": {"total": 1.0}})
    assert write_summary(config, {}, ReferenceVersion(0, 0, "init", ""), 0, None)["steps_updated"] == 1


def test_a_run_that_goes_on_is_not_finished(tmp_path: Path) -> None:
    config = make_config(tmp_path / "model", name="run", runs_dir=str(tmp_path))
    file = MetricsFile(config.run_dir / "metrics.jsonl")
    file.append({"step": 1, "updates": 1, "seconds": {"total": 1.0}})
    write_summary(config, {}, ReferenceVersion(0, 0, "init", ""), 0, None)
    file.drop_after(1)
    assert not (config.run_dir / "summary.json").exists()


def test_a_run_folder_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    """A checkpoint would make the folder again: half of the run here, half of it elsewhere, and "done"."""
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.append({"step": 1})
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="was moved or removed while the run wrote into it; put it back"):
        file.append({"step": 2})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
