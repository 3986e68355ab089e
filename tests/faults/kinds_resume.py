"""Changes between two attempts of a run: accepted and exact, or refused in one line that names the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ended import Lost, Wrong
from registry import fault
from trial import GOLDEN, Trial

NEVER_DAMAGED = "a good checkpoint is never called damaged"
DAMAGED = "a damaged checkpoint is named and an older one taken"
RESUME = "a changed configuration is taken up exactly, or refused in one line"


def _two_steps(trial: Trial, *overrides: str) -> None:
    """A run that was stopped after two of its steps."""
    run = trial.start(*overrides)
    run.wait_until(lambda: 2 in trial.saved(), "checkpoint 2")
    run.kill()


def _refused_and_intact(trial: Trial, pattern: str, *overrides: str) -> None:
    saved = trial.saved()
    trial.train(*overrides).refused(pattern, code=2)
    if trial.saved() != saved:
        raise Lost(f"checkpoints were {saved} and are {trial.saved()}")
    trial.goes_on(at_least=max(saved))


@fault("resumed with fewer steps than done", promise=RESUME, by=("command", "ranks"))
def fewer_steps(trial: Trial) -> None:
    trial.train().done()
    saved = trial.saved()
    trial.train("optimizer.steps=3").refused(r"optimizer\.steps = 3: this run has done 4 steps already", code=2)
    if trial.saved() != saved:
        raise Lost(f"checkpoints were {saved} and are {trial.saved()}")
    trial.train().done()
    trial.same_as_without()


@fault("resumed with another seed", promise=RESUME, by=("command", "ranks"))
def another_seed(trial: Trial) -> None:
    _two_steps(trial)
    _refused_and_intact(trial, "seed", "seed=7")


@fault("resumed with other data", promise=RESUME, by=("command", "ranks"))
def other_data(trial: Trial) -> None:
    _two_steps(trial)
    _refused_and_intact(trial, "data", "data.source=task:countdown", "data.max_prompt_tokens=64")


@fault("resumed in another dtype", promise=RESUME, by=("command", "ranks"))
def another_dtype(trial: Trial) -> None:
    _two_steps(trial)
    _refused_and_intact(trial, r"model\.dtype = bfloat16: .*in float32; resume with that", "model.dtype=bfloat16")


@fault("resumed with a model of another depth", promise=RESUME, by=("command", "ranks"))
def another_depth(trial: Trial) -> None:
    _two_steps(trial)
    model = trial.folder / "deeper"
    shutil.copytree(GOLDEN / "base_model", model)
    _deepen(model)
    _refused_and_intact(trial, r"decoder\.layers|layers", f"model.path={model}")


def _deepen(model: Path) -> None:
    """One layer more, a copy of the last one."""
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers + 1
    if "layer_types" in config:
        config["layer_types"] = [*config["layer_types"], config["layer_types"][-1]]
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    last = f"model.layers.{layers - 1}."
    more = {
        name.replace(last, f"model.layers.{layers}."): value.clone() for name, value in weights.items() if last in name
    }
    save_file(weights | more, model / "model.safetensors", metadata={"format": "pt"})


@fault("the method changed, and changed back", promise=NEVER_DAMAGED, by=("command", "ranks"))
def method_there_and_back(trial: Trial) -> None:
    """owpo, then dapo, which keeps no reference, then owpo again: the last is refused by name, and nothing is lost."""
    _two_steps(trial)
    trial.train("algorithm.name=dapo", "optimizer.steps=3", "rollout.replay=" + str(trial.ground.rollouts)).done()
    saved = trial.saved()
    ended = trial.train().refused(r"algorithm\.name .*keeps no reference", code=2)
    if "damaged" in ended.text or "remove it" in ended.text:
        raise Wrong(f"a good checkpoint is called damaged:\n{ended.text}")
    if trial.saved() != saved:
        raise Lost(f"checkpoints were {saved} and are {trial.saved()}")
    trial.train("algorithm.name=dapo").done("resumed at step 3")


@fault("resumed with another learning rate", promise=RESUME, by=("command", "ranks"))
def another_rate(trial: Trial) -> None:
    _two_steps(trial)
    saved = max(trial.saved())
    trial.train("optimizer.lr=1e-4").done(rf"resumed at step {saved}\b")


@fault("resumed in another layout", promise=RESUME)
def another_layout(trial: Trial) -> None:
    """One rank before, two tensor-parallel ones after: the same numbers to rounding."""
    _two_steps(trial)
    trial.train(tp=2).done("resumed at step")
    straight = [json.loads(line) for line in (trial.ground.without_fault(1) / "metrics.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (trial.run_dir / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(straight, ours, strict=True):
        if abs(one["loss"] - other["loss"]) > 1e-5 or abs(one["grad_norm"] - other["grad_norm"]) > 1e-4:
            raise Wrong(f"step {one['step']}: {one} against {other}")


@fault("half a line at the end of metrics.jsonl", promise="a killed run resumes bit for bit", by=("command", "ranks"))
def half_a_line(trial: Trial) -> None:
    _two_steps(trial)
    with (trial.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward_me')
    trial.goes_on(at_least=2)


@fault(
    "the newest checkpoint damaged",
    promise=DAMAGED,
    by=("command", "ranks"),
)
def newest_damaged(trial: Trial) -> None:
    run = trial.start()
    run.wait_until(lambda: 3 in trial.saved(), "checkpoint 3")
    run.kill()
    newest = max(trial.saved())
    files = sorted(file for file in trial.checkpoint(newest).rglob("*") if file.is_file() and file.stat().st_size)
    file = trial.rng.choice([one for one in files if one.name != "manifest.json"])
    content = bytearray(file.read_bytes())
    how = trial.rng.choice(["flipped", "cut", "emptied", "deleted"])
    if how == "flipped":
        content[trial.rng.randrange(len(content))] ^= 0xFF
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes({"flipped": bytes(content), "cut": bytes(content[: len(content) // 2]), "emptied": b""}[how])
    trial.goes_on(at_least=newest - 1, pattern=rf"the checkpoint of step {newest} is damaged")
    trial.is_noted(damaged_checkpoints=[newest])


@fault("lines of metrics.jsonl lost", promise=RESUME, by=("command", "ranks"))
def lines_lost(trial: Trial) -> None:
    """The file is gone, or its beginning is garbage: the weights are right, and what is lost is named."""
    trial.train("optimizer.steps=2").done()
    file = trial.run_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if trial.rng.random() < 0.5:
        file.unlink()
    else:
        file.write_bytes(b"\xff\x00\n" * 3 + lines[-1])
    trial.train().done(r"metrics\.jsonl has lost the lines of (step 1|2 steps from 1 to 2)")
    straight = trial.ground.without_fault(trial.tp)
    for weights in sorted((straight / "hf").glob("*.safetensors")):
        if (trial.run_dir / "hf" / weights.name).read_bytes() != weights.read_bytes():
            raise Wrong(f"other weights in {weights.name}")
