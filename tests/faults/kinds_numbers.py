"""Numbers that are none, and steps that change nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ended import Wrong
from owpo import lines_of
from registry import fault
from trial import GOLDEN, STEPS, Trial

SILENT = "a run that trains on nothing ends with the reason"
REPLAY = "owpo replay computes a step again and compares it"
NUMBERS = "a number that is none is named with its cause"
RULES = {
    "all_crash": "def rule(response, answer):\n    raise RuntimeError('no such file')\n",
    "all_none": "def rule(response, answer):\n    return None\n",
    "all_wrong": "def rule(response, answer):\n    return False\n",
    "all_right": "def rule(response, answer):\n    return 1\n",
    "numbers": "def rule(response, answer):\n    return int(response.strip() == answer)\n",
    "numpy": "import numpy\n\ndef rule(response, answer):\n    return numpy.bool_(response.strip() == answer)\n",
}


def _rule(trial: Trial, name: str) -> list[str]:
    """The overrides for a rule of one's own, whose module is beside the run's folder."""
    module = f"{name}_{abs(hash(str(trial.folder))) % 10**8}"
    (trial.folder / f"{module}.py").write_text(RULES[name])
    trial.path = trial.folder
    return [f"verifier.rule=python:{module}:rule"]


@fault("a rule that always crashes", promise=SILENT, by=("command", "ranks"))
def rule_crashes(trial: Trial) -> None:
    name = trial.rng.choice(["all_crash", "all_none"])
    pattern = r"verifier\.rule = .*no answer could be graded .*(no such file|returned None)"
    trial.train(*_rule(trial, name)).refused(pattern, code=2)


@fault("a rule with one verdict for all", promise=SILENT, by=("command", "ranks"), quick=True)
def rule_is_constant(trial: Trial) -> None:
    rule = _rule(trial, trial.rng.choice(["all_wrong", "all_right"]))
    ended = trial.train(*rule, "checks.silent_steps=3", "rollout.max_rounds=1", "optimizer.steps=8")
    ended.refused(r"step 3 is number 3 in a row: nothing to learn from .*verdicts: .*checks\.silent_steps")
    if ended.text.count("step 1: nothing to learn from") != 1:
        raise Wrong(f"the first step without a signal was not reported once:\n{ended.text}")
    if any("silent" not in line.get("trouble", ()) for line in lines_of(trial.run_dir)):
        raise Wrong(f"steps are not marked: {lines_of(trial.run_dir)}")


@fault("a rule that returns numbers or numpy's bools", promise=SILENT, by=("command", "ranks"))
def rule_returns_numbers(trial: Trial) -> None:
    trial.train(*_rule(trial, trial.rng.choice(["numbers", "numpy"]))).done()
    summary = json.loads((trial.run_dir / "summary.json").read_text())
    if summary["steps_updated"] != STEPS:
        raise Wrong(f"not every step updated the weights: {summary}")


@fault("a weight of the model is NaN", promise=NUMBERS, by=("command", "ranks"), quick=True)
def nan_weight(trial: Trial) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = trial.folder / "model"
    shutil.copytree(GOLDEN / "base_model", model)
    weights = load_file(model / "model.safetensors")
    name = trial.rng.choice(sorted(weights))
    flat = weights[name].view(-1)
    flat[trial.rng.randrange(len(flat))] = trial.rng.choice([torch.nan, torch.inf])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    trial.train(f"model.path={model}").refused(r"model\.path = .*weights that are not finite", code=2)


@fault("a learning rate of 1e10", promise=NUMBERS, by=("command", "ranks"))
def learning_rate(trial: Trial) -> None:
    """The update after the first one has no finite gradient; its batch is there, and the checkpoint is as it was."""
    trial.train("optimizer.steps=2").done()
    ended = trial.train("optimizer.lr=1e10", "optimizer.warmup_steps=0", "rollout.save=false")
    ended.refused(
        r"step \d+: the gradient's norm is (nan|inf) at learning rate 1e\+10.*lower optimizer\.lr.*owpo replay"
    )
    if not list((trial.run_dir / "rollouts").glob("step_*.jsonl")):
        raise Wrong("the batch of the bad gradient is not kept")
    trial.lines_are_json()
    trial.goes_on(at_least=2)


@fault("a learning rate of 1e10, updates skipped", promise=NUMBERS)
def learning_rate_skipped(trial: Trial) -> None:
    fields = ["optimizer.lr=1e10", "optimizer.warmup_steps=0", "checks.bad_gradient=skip", "checks.silent_steps=2"]
    ended = trial.train(*fields, "optimizer.steps=8")
    ended.refused(r"every update of this step was skipped").told("an update is skipped: .*step 1")
    trial.lines_are_json()


@fault("the clock jumps", promise="the clock of the machine does not matter", by=("ranks",))
def clock_jumps(trial: Trial) -> None:
    """time.time() is days off from a moment of the run on, forwards or backwards."""
    trial.train(before="kinds_numbers:jump", argument=trial.rng.choice([-3.0, 3.0]) * 86400).done()
    trial.same_as_without()


def jump(seconds: float) -> None:
    """Runs in the rank: the clock is right for two seconds."""
    import time

    real, begin = time.time, time.monotonic()
    time.time = lambda: real() + (seconds if time.monotonic() - begin > 2 else 0.0)  # type: ignore[assignment]


@fault("a line of the rollouts is cut", promise="bad input is refused in one line", by=("command", "ranks"))
def recorded_line_is_cut(trial: Trial) -> None:
    folder = trial.folder / "cut"
    folder.mkdir()
    lines = (trial.ground.rollouts / "step_000001.jsonl").read_text().splitlines(keepends=True)
    place = trial.rng.randrange(len(lines))
    lines[place] = lines[place][: len(lines[place]) // 2] + "\n"
    (folder / "step_000001.jsonl").write_text("".join(lines))
    trial.train(f"rollout.replay={folder}").refused(rf"step_000001\.jsonl:{place + 1} = .*not a saved rollout", code=2)


@fault("config.yaml of the run is cut", promise="bad input is refused in one line", by=("command",))
def config_is_cut(trial: Trial) -> None:
    """The resolved configuration in the run's folder, half of which is gone."""
    trial.train("optimizer.steps=2").done()
    file: Path = trial.run_dir / "config.yaml"
    file.write_text(file.read_text()[: trial.rng.randrange(len(file.read_text()))])
    trial.goes_on(at_least=2)


@fault("a logged number is changed", promise=REPLAY, by=("command",))
def logged_number_changed(trial: Trial) -> None:
    """The step agrees bit for bit as it was logged, and is found out once a digit of a number is another one."""
    trial.train().done()
    step = trial.rng.randint(1, STEPS)
    ended = trial.owpo("replay", str(trial.run_dir), "--step", str(step))
    if ended.code != 0 or ended.text.count(": equal") != 3:
        raise Wrong(f"exit code {ended.code}:\n{ended.text}")
    lines = lines_of(trial.run_dir)
    field = trial.rng.choice(["loss", "grad_norm", "weights"])
    value = lines[step - 1][field]
    lines[step - 1][field] = f"{'f' if value[0] != 'f' else 'e'}{value[1:]}" if field == "weights" else value * 1.001
    (trial.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = trial.owpo("replay", str(trial.run_dir), "--step", str(step))
    if ended.code != 1 or not re.search(rf"{field} .*: differs", ended.text):
        raise Wrong(f"exit code {ended.code}:\n{ended.text}")


@fault("a step with a bad gradient is replayed", promise=REPLAY, by=("command",))
def bad_step_replayed(trial: Trial) -> None:
    """The step that ended a run ends in the same way."""
    ended = trial.train("optimizer.lr=1e10", "optimizer.warmup_steps=0").refused(r"step \d+: the gradient's norm is")
    found = re.search(r"step (\d+): (the gradient's norm is \S+ at learning rate \S+)", ended.text)
    assert found is not None
    again = trial.owpo("replay", str(trial.run_dir), "--step", found[1])
    if again.code != 1 or f"it ends as follows: step {found[1]}: {found[2]}" not in again.text:
        raise Wrong(f"exit code {again.code}:\n{again.text}")
