"""The first prompts of a run, made before anything starts: `python -m owpo_megatron.launch.preview < config.json`.

Those of training and of the evaluation sets. A template that raises, or a token that the model does not have, is found
in seconds. In a process of its own, since
tokenizers import torch. Prints a JSON list [field, value, remedy] and exits with code 2 for a user's mistake.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.data.hub import PREFIX
from owpo_megatron.data.sources import load_prompts, read_problems
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    generation_eos_ids,
    load_tokenizer,
    vocab_size_of,
)
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.prepare import prepare
from owpo_megatron.evaluation.sets import data_folder, resolve, source_of

FIRST = 256  # problems that are looked at, unless any of them may have a token that the model lacks
MISTAKE = 2  # exit code


def check_prompts(config: Config) -> None:
    """Make the first prompts in another process, where something could be wrong with them.

    Plain texts of a tokenizer that has no more ids than the model need no such look.

    Raises:
        UserError: what a rank would find later.
    """
    files = hf_folder(config.model.path)
    if not any((files / name).is_file() for name in TOKENIZER_FILES):
        return  # the model's small files alone, on a login node
    if config.data.template in ("raw", "completion") and not (_has_more_ids(files) or _has_token_ids(config)):
        return
    command = [sys.executable, "-m", "owpo_megatron.launch.preview"]
    settings = json.dumps(config.model_dump(mode="json"))
    done = subprocess.run(command, input=settings, capture_output=True, text=True)
    if done.returncode == MISTAKE:
        raise UserError(*json.loads(done.stdout.splitlines()[-1]))
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"]
        raise UserError("data", config.data.source or "data.sources", f"no prompts can be made of it: {lines[-1]}")


def _has_more_ids(files: Path) -> bool:
    """Whether the tokenizer, or the end of a response, has ids that the model lacks, or may have."""
    vocab_size = vocab_size_of(files / "config.json")
    try:
        content = json.loads((files / "tokenizer.json").read_bytes())
        vocab = content["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        added = (token["id"] for token in content.get("added_tokens") or ())
        largest = max([*ids, *added, *generation_eos_ids(files / "generation_config.json")])
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return vocab_size is None or bool(largest >= vocab_size)


def _has_token_ids(config: Config) -> bool:
    """Whether the data are tokenized already, as far as their first records show."""
    for part in config.data.parts:
        columns = config.data.columns if part.columns is None else part.columns
        first = next(read_problems(part.source, columns=columns), None)
        if first is not None and first.token_ids:
            return True
    return False


def _look_at_sets(config: Config, tokenizer: Tokenizer, first: int | None) -> None:
    """Make the first prompts of the evaluation sets that are on this machine; the hub is not contacted."""
    template, folder = PromptTemplate.of(config.data, tokenizer), data_folder(config.eval.data_dir)
    for spec in (resolve(one, config.eval) for one in config.eval.sets):
        source = source_of(spec, folder)
        if not source.startswith(PREFIX):
            fewer = [one for one in (spec.limit, first) if one is not None]
            prepare(replace(spec, limit=min(fewer, default=None)), source, template, config.seed)


def main() -> int:
    config = Config.build(json.load(sys.stdin))
    files = hf_folder(config.model.path)
    try:
        tokenizer = load_tokenizer(files)
        first = None if _has_more_ids(files) or _has_token_ids(config) else FIRST
        tokenizer.check_stop(config.rollout.stop)
        load_prompts(config.data, tokenizer, first=first)
        if config.eval.before or config.eval.after or config.eval.every:
            _look_at_sets(config, tokenizer, first)
        if config.data.eval_source is not None:
            load_prompts(config.data, tokenizer, "test", limit=first)
    except UserError as error:
        print(json.dumps([error.field, str(error.value), error.remedy]))
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
