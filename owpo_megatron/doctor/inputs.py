"""A run's inputs: contradictory settings, a model that the layout does not divide, unreadable files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from owpo_megatron.config import hf_folder
from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.doctor.memory_needs import size
from owpo_megatron.errors import UserError


def settings(scope: Scope) -> Iterator[Finding]:
    """The checks that `owpo train` makes before it starts, one row each."""
    from owpo_megatron.launch.preflight import CHECKS

    assert scope.config is not None
    for check in CHECKS:
        name = "config: " + check.__name__.strip("_").replace("_", " ")
        try:
            check(scope.config)
        except UserError as error:
            yield _refused(name, error)
        else:
            yield Finding(name, "ok", "")


def model(scope: Scope) -> Iterator[Finding]:
    """The model's shape against the parallel layout, its weights, its tokenizer."""
    from owpo_megatron.data import load_tokenizer
    from owpo_megatron.families import check_parallel, read_hf_config

    assert scope.config is not None
    config = scope.config
    folder = hf_folder(config.model.path)
    shape = read_hf_config(folder)
    parallel = config.parallel
    layout = parallel.sizes
    try:
        check_parallel(shape, parallel)
    except UserError as error:
        yield _refused("layout", error)
    else:
        detail = f"{layout} divides {shape.attention.num_heads} heads and {shape.num_layers} layers"
        yield Finding("layout", "ok", detail)
    weights = sum(file.stat().st_size for file in _weight_files(folder, config.model.path))
    if weights:
        yield Finding("weights", "ok", f"{size(weights)} in {config.model.path}")
    else:
        remedy = "give a folder with *.safetensors, or a converted one"
        yield Finding("weights", "fail", f"none in {config.model.path}", remedy)
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        yield _refused("tokenizer", error)
    else:
        yield Finding("tokenizer", "ok", f"{len(tokenizer)} tokens; a response ends with {tokenizer.eos_ids}")


def data(scope: Scope) -> Iterator[Finding]:
    """Problems through template and tokenizer, exactly as the run reads them, and their lengths against the context."""
    from owpo_megatron.data import load_prompts, load_tokenizer
    from owpo_megatron.engine.context import check_context_length, context_length

    assert scope.config is not None
    config = scope.config
    folder = hf_folder(config.model.path)
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return  # reported by the check of the model
    tokenizer.check_stop(config.rollout.stop)
    prompts, report = load_prompts(config.data, tokenizer, "train")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    yield Finding("data", "ok", f"{report}; the longest prompt has {longest} tokens")
    try:
        check_context_length(config, longest)
    except UserError as error:
        yield _refused("context", error)
    else:
        fits = f"{longest} prompt + {config.rollout.max_response_tokens} response tokens fit"
        yield Finding(
            "context", "ok", f"{fits} into the model's {context_length(folder, config.sglang) or '(unknown)'}"
        )


def _weight_files(files: Path, model: Path) -> list[Path]:
    """Weight files of an HF folder (safetensors) or of a converted one."""
    return sorted(files.glob("*.safetensors")) or sorted(model.rglob("*.distcp"))


def _refused(what: str, error: UserError) -> Finding:
    return Finding(what, "fail", f"{error.field} = {error.value}", error.remedy)
