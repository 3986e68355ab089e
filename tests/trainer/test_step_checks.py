"""Steps that change nothing, and steps whose numbers cannot be right: reported at the first, the end after several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny import make_config

from owpo_megatron.config import ChecksConfig, EngineConfig, SyncConfig
from owpo_megatron.engine import Fleet
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.methods import make_method
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.trainer.build_checks import build_checks
from owpo_megatron.trainer.checks import BadGradients, StepChecks, mismatch_bound, no_weights_are_lost, silence
from owpo_megatron.trainer.watchdog import Watchdog
from owpo_megatron.types import Verdict

FINE = {"updates": 2, "grad_norm": 0.5, "mismatch": 1e-6, "groups": 4, "tokens_generated": 90}
WRONG = {"updates": 0, "groups": 0, "verifier": {"no_answer": 450, "wrong": 62}, "tokens_generated": 90}


def checks(said: list[str], mismatch: float | None = 0.01, restarts: Sequence[int] = (), **fields: Any) -> StepChecks:
    totals = iter(restarts)
    counts = {"engine_restarts": lambda: next(totals, 0)}
    return StepChecks(ChecksConfig(**fields), mismatch, refuse, counts, said.append)


def refuse(verdicts: Sequence[Verdict]) -> None:
    if verdicts and all(one.reason == "crashed" for one in verdicts):
        raise UserError("verifier.rule", "r", "nothing was graded")


def test_silent_steps_are_reported_once_and_end_the_run() -> None:
    said: list[str] = []
    judge = checks(said, silent_steps=3)
    for step in (1, 2):
        judge.step(WRONG | {"step": step})
    judge.step(FINE | {"step": 3})
    for step in (4, 5):
        judge.step(WRONG | {"step": step})
    assert len(said) == 2 and "450 no_answer, 62 wrong" in said[0] and "step 4" in said[1]
    with pytest.raises(RunError, match=r"step 6 is number 3 in a row: nothing to learn .*checks\.silent_steps"):
        judge.step(WRONG | {"step": 6})


def test_zero_never_ends_a_run() -> None:
    judge = checks([], silent_steps=0, mismatch_steps=0)
    for step in range(1, 50):
        judge.step(WRONG | {"step": step, "mismatch": 9.0, "policy_version": step - 1})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (WRONG, "no group had right and wrong answers"),
        ({"updates": 0, "groups": 4, "verifier": {"crashed": 3, "timeout": 1}}, "not one answer was graded"),
        ({"updates": 0, "groups": 4, "tokens_generated": 0}, "no tokens"),
        ({"updates": 2, "groups": 4, "grad_norm": 0.0}, "its gradient is zero"),
        ({"updates": 0, "updates_skipped": 2, "groups": 4}, "its gradients were not finite"),
        ({"updates": 1, "updates_skipped": 1, "grad_norm": 0.1}, None),
        (FINE, None),
    ],
)
def test_what_silence_is(line: dict[str, Any], reason: str | None) -> None:
    found = silence({"step": 1} | line)
    assert (reason in found) if reason and found else found is None


def test_a_mismatch_marks_its_step_and_ends_the_run() -> None:
    said: list[str] = []
    judge = checks(said, mismatch_steps=2)
    assert judge.of(FINE | {"step": 1, "policy_version": 0}) == {}
    off = FINE | {"mismatch": 0.02, "policy_version": 1, "step": 2}
    assert judge.of(off) == {"trouble": ["mismatch"]}
    judge.step(off)
    stale = off | {"step": 4}  # drawn with older weights on purpose: no mismatch of the same weights
    assert judge.of(stale) == {}
    judge.step(stale)
    judge.step(off)
    with pytest.raises(RunError, match=r"mismatch 0\.02.*above 0\.01 \(checks\.mismatch\).*checks\.mismatch_steps"):
        judge.step(off | {"step": 2})
    assert checks([], mismatch=None).of(off) == {}, "a replay is not compared"


def test_the_bound_depends_on_the_dtype() -> None:
    plain, fp8 = SyncConfig(), SyncConfig(fp8=True)
    assert mismatch_bound(ChecksConfig(), plain, "float32") == 0.01
    assert mismatch_bound(ChecksConfig(), plain, "bfloat16") == 0.3
    assert mismatch_bound(ChecksConfig(), fp8, "bfloat16") == 0.6
    assert mismatch_bound(ChecksConfig(mismatch=0.07), fp8, "bfloat16") == 0.07


def test_numbers_that_are_none_and_restarts_are_in_the_line() -> None:
    judge = checks([], restarts=[0, 2, 2, 3])
    assert judge.of(FINE | {"step": 1, "policy_version": 0}) == {}
    found = judge.of(FINE | {"step": 2, "policy_version": 1, "entropy": float("nan"), "loss": float("inf")})
    assert found == {"trouble": ["entropy", "loss"], "engine_restarts": 2}
    assert judge.of(FINE | {"step": 3, "policy_version": 2}) == {}
    assert judge.of(FINE | {"step": 4, "policy_version": 3}) == {"engine_restarts": 1}


def test_a_rule_that_never_graded_is_refused_and_one_that_pauses_is_not() -> None:
    crashed, graded = [Verdict(False, "crashed")] * 2, [Verdict(False, "wrong"), Verdict(False, "crashed")]
    with pytest.raises(UserError, match="nothing was graded"):
        checks([]).verdicts(crashed)
    judge = checks([])
    judge.verdicts(graded)
    judge.verdicts(crashed)  # an endpoint that is away for a while: silent steps, counted


def test_bad_gradients(tmp_path: Path) -> None:
    watchdog = Watchdog(ChecksConfig(), EngineConfig(), tmp_path, 0, 1)
    watchdog.begin(7)
    kept, said = [], []
    for name, gone in (("stop", True), ("skip", False)):
        config = ChecksConfig(bad_gradient=name)  # type: ignore[arg-type]
        handle = BadGradients(config, RunFolder(tmp_path), watchdog, lambda: kept.append(1), said.append)
        if gone:
            with pytest.raises(RunError, match=rf"step 7: too large .*owpo replay {tmp_path} --step 7"):
                handle("too large")
        else:
            handle("too large")
    assert len(kept) == 2 and len(said) == 1


def test_weights_that_are_not_finite() -> None:
    no_weights_are_lost(Path("m"), True)
    with pytest.raises(UserError, match="model.path = m: has weights that are not finite"):
        no_weights_are_lost(Path("m"), False)


def test_what_a_plan_draws_at_other_temperatures_is_not_compared(tmp_path: Path) -> None:
    """EAD's responses are the policy's at falling temperatures: their engine log-probs are no sign of wrong weights."""
    config = make_config(tmp_path)
    fleet = cast(Fleet, SimpleNamespace(restarts=0))
    far = FINE | {"step": 1, "mismatch": 9.0}
    for name, stops in (("dapo", True), ("ead", False)):
        judge = build_checks(config, fleet, None, make_method(name).draws_as_policy, lambda text: None)
        with pytest.raises(RunError, match="mismatch") if stops else nullcontext():
            for step in range(1, config.checks.mismatch_steps + 1):
                judge.step(far | {"step": step})
