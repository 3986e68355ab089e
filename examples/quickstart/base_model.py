"""Make the quickstart's base model: a tiny Qwen3 warmed up on a task's demonstrations, as a Hugging Face folder.

    python examples/quickstart/base_model.py --task cipher --out cache/quickstart/cipher

Plain transformers and torch. The result depends on the settings alone and is kept under cache/base_models/ by a hash
of them, so that the second call only copies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from owpo_megatron.data.problem import Problem
from owpo_megatron.data.small_tokenizers import make_character_tokenizer, padded_vocab_size
from owpo_megatron.data.tasks import Task, get_task
from owpo_megatron.errors import UserError

if TYPE_CHECKING:  # seconds: imported where a model is made, not where the cache has it
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SETTINGS_FILE = "warmup.json"  # what the folder was made from; marks it as ours to replace
IGNORED = -100  # label of a position that takes no part in the loss


@dataclass(frozen=True)
class WarmUp:
    """Everything that the base model depends on. All sizes divide by two, for tensor parallelism on two ranks."""

    task: str = "cipher"
    seed: int = 1
    steps: int = 150
    batch_size: int = 256
    lr: float = 3e-3
    lr_warmup_steps: int = 20
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn_size: int = 128
    version: int = 2  # raise it when the code below changes what comes out

    def hash(self) -> str:
        """Hash of the settings and of the task's lessons, so that a changed task makes a new model."""
        task, rng = get_task(self.task), random.Random(0)
        lessons = [(problem.text, task.demonstrate(problem, rng)) for problem in task.problems("train")[:512]]
        return hashlib.sha256(json.dumps([asdict(self), lessons], sort_keys=True).encode()).hexdigest()[:12]


RECIPES = {
    "cipher": WarmUp(),
    "countdown": WarmUp(task="countdown", steps=300, hidden_size=96, layers=3, head_dim=24, ffn_size=256),
    "lookup": WarmUp(task="lookup", steps=1000, lr=6e-3),
    "sums": WarmUp(task="sums", steps=600, lr=6e-3),
}


def make_base_model(
    settings: WarmUp, cache_dir: Path, progress: Callable[[int, int, float], None] | None = None
) -> Path:
    """The folder of the base model, trained unless the cache has it.

    Args:
        cache_dir: the model goes to `cache_dir/TASK-HASH`; it appears there complete or not at all.
        progress: called with (steps done, all steps, loss).
    """
    folder = cache_dir / f"{settings.task}-{settings.hash()}"
    if (folder / SETTINGS_FILE).is_file():
        return folder
    from transformers import Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    task = get_task(settings.task)
    tokenizer = make_character_tokenizer(task.alphabet)
    tokenizer = make_character_tokenizer(task.alphabet, padded_vocab_size(tokenizer))
    with _one_thread_seeded(settings.seed):
        model = Qwen3ForCausalLM(model_config(settings, tokenizer))
        warm_up(model, tokenizer, task, settings, progress)
    disable_progress_bar()  # transformers' own, while it saves
    with _appearing_at_once(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")
    return folder


def model_config(settings: WarmUp, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=settings.hidden_size**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # Named, it would get an embedding of exactly zero, behind which RMSNorm's gradient is 1/sqrt(eps) = 1000 times
        # too large when a policy once samples it.
        pad_token_id=None,
        dtype="float32",
    )


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    settings: WarmUp,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Supervised training on demonstrations of train problems; only the response's tokens count."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(tokenizer, task, settings)
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _lr_factor(step, settings)
        input_ids_BT, label_BT = next(batches)
        logits_BTV = model(input_ids=input_ids_BT[:, :-1]).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), label_BT[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress(step + 1, settings.steps, loss.item())
    model.eval()


def _lr_factor(step: int, settings: WarmUp) -> float:
    """Linear rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / settings.lr_warmup_steps)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


def _batches(
    tokenizer: PreTrainedTokenizerFast, task: Task, settings: WarmUp
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids [B, T], labels [B, T]), padded on the right, which causal attention does not see."""
    import torch

    rng = random.Random(f"warm-up/{settings.seed}")
    problems = task.problems("train")
    while True:
        rng.shuffle(problems)
        for start in range(0, len(problems) - settings.batch_size + 1, settings.batch_size):
            rows = [_row(tokenizer, task, p, rng) for p in problems[start : start + settings.batch_size]]
            longest = max(len(ids) for ids, _ in rows)
            pad = tokenizer.pad_token_id
            yield (
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
            )


def _row(
    tokenizer: PreTrainedTokenizerFast, task: Task, problem: Problem, rng: random.Random
) -> tuple[list[int], list[int]]:
    demonstration = task.demonstrate(problem, rng)
    turns = [demonstration] if isinstance(demonstration, str) else demonstration
    ids = tokenizer.encode(problem.text, add_special_tokens=False)
    labels = [IGNORED] * len(ids)
    for place, text in enumerate(turns):
        turn = tokenizer.encode(text, add_special_tokens=False)
        if place % 2:  # what the replies are answered is context alone
            ids, labels = ids + turn, labels + [IGNORED] * len(turn)
        else:
            turn.append(tokenizer.eos_token_id)
            ids, labels = ids + turn, labels + turn
    return ids, labels


@contextmanager
def _one_thread_seeded(seed: int) -> Iterator[None]:
    """The order of floating-point sums depends on the threads: one gives the same weights on every machine like it."""
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


@contextmanager
def _appearing_at_once(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder` that takes its place at the end, and is gone after a failure.

    Raises:
        UserError: something else is in that place.
    """
    if folder.exists() and not (folder / SETTINGS_FILE).is_file():
        raise UserError("--out", folder, "exists and was not made by this script; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cipher", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="copy the model there (default: cache/quickstart/TASK)")
    parser.add_argument("--cache", type=Path, default=Path("cache/base_models"), help="where models are kept")
    options = parser.parse_args(arguments)
    settings = WarmUp(**{**asdict(RECIPES[options.task]), "seed": options.seed})
    out = options.out or Path("cache/quickstart") / options.task
    try:
        with _progress_bar(settings.task) as progress:
            folder = make_base_model(settings, options.cache, progress)
        with _appearing_at_once(out) as draft:
            shutil.copytree(folder, draft, dirs_exist_ok=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"base model for {settings.task}: {out}")
    return 0


@contextmanager
def _progress_bar(task: str) -> Iterator[Callable[[int, int, float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("warm-up on {task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn()) as bar:
        row = bar.add_task(task, total=None, visible=False, note="")  # unseen where the cache has the model

        def update(done: int, total: int, loss: float) -> None:
            bar.update(row, completed=done, total=total, visible=True, note=f"loss {loss:.3f}")

        yield update


if __name__ == "__main__":
    sys.exit(main())
