"""The other side of `owpo bench step`: TRL's GRPOTrainer on the same files, run by the Python of its own environment.

    python step_trl.py SETTINGS GO DONE

Imports nothing of this project. Each line on the pipe GO lets one step run; a line of JSON on DONE ends it. SETTINGS is
a JSON file: folder, threads, microbatch (samples), steps, response, prompts, group, beta, clip, lr, clip_grad.
"""

# mypy: disable-error-code="union-attr, arg-type"
from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]


class Timed(GRPOTrainer):
    """Adds up the seconds of a step's phases, and keeps the first step's tokens and advantages."""

    seconds: dict[str, float] = {}
    kept: dict[str, list] | None = None

    def _generate(self, *args, **kwargs):
        start = time.perf_counter()
        out = super()._generate(*args, **kwargs)
        self._add("rollout", start)
        return out

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        start = time.perf_counter()
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._add("logp_ref", start)
        return out

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if self.kept is None:
            names = ("prompt_ids", "completion_ids", "advantages")
            self.kept = {name: out[name].tolist() for name in names}
        return out

    def _add(self, phase: str, start: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Gate(TrainerCallback):
    def __init__(self, go: str, done: str):
        self.trainer: Timed | None = None
        self._done = open(done, "w", buffering=1)
        self._go = open(go)

    def on_step_begin(self, args, state, control, **kwargs):
        self._go.readline()
        self.trainer.seconds.clear()
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Comes after the step's end."""
        if "loss" not in (logs or {}):
            return
        seconds, first = dict(self.trainer.seconds), self.trainer.kept
        seconds["update"] = self._seconds - sum(seconds.values())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        line = {
            "seconds": self._seconds,
            "phases": seconds,
            "cpu_seconds": self._cpu_seconds,
            "peak_bytes": {"trl": 1024 * usage.ru_maxrss},
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
        }
        if state.global_step == 1:
            line |= first
        self._done.write(json.dumps(line) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds, self._cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu


def main(settings_file: str, go: str, done: str) -> None:
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    model.config._name_or_path = str(folder / "reference")  # from which TRL makes its reference
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    with (folder / "prompts.jsonl").open() as file:
        prompts = [{"prompt": json.loads(line)["prompt"]} for line in file]

    def reward(completions, **kwargs):
        return [
            float(sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) % 2 == 1) for text in completions
        ]

    samples = settings["prompts"] * settings["group"]
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["microbatch"],
        gradient_accumulation_steps=samples // settings["microbatch"],
        num_generations=settings["group"],
        max_completion_length=settings["response"],
        max_steps=settings["steps"],
        beta=settings["beta"],
        epsilon=settings["clip"],
        loss_type="grpo",
        use_bias_correction_kl=False,  # TRL multiplies the KL by the ratio by default, which changes its gradient
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=settings["clip_grad"],
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    gate = Gate(go, done)
    trainer = Timed(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[gate],
    )
    gate.trainer = trainer
    assert trainer.ref_model is not None and next(trainer.ref_model.parameters()).dtype == torch.float32
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
