"""Checks of a run that cost nothing: they find the mistakes that would otherwise show up minutes later, on a rank."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.data.tasks import get_task
from owpo_megatron.errors import UserError
from owpo_megatron.launch.machine import gpu_names
from owpo_megatron.rollout.command import check_surroundings, server_arguments


def preflight(config: Config) -> None:
    """Look at everything that a run will need on this machine.

    Raises:
        UserError: the first thing that is missing or cannot work.
    """
    for check in CHECKS:
        check(config)


def needs_own_engine(config: Config) -> bool:
    """True when the run starts SGLang itself."""
    return not config.engine.urls and config.rollout.replay is None


def _model(config: Config) -> None:
    _model_folder("model.path", config.model.path)
    if config.reference.path is not None:
        _model_folder("reference.path", config.reference.path)


def _model_folder(field: str, path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            field, path, "no such folder; give an HF checkpoint folder (for the small model: owpo quickstart)"
        )
    if not any(path.iterdir()):
        raise UserError(field, path, "the folder is empty; give one that holds a checkpoint")


def _shape(config: Config) -> None:
    """Model dimensions that parallelism divides. The GPU-side rules of megatron-core are its own."""
    facts = _hf_config(config.model.path)
    par = config.parallel
    divided = [
        ("parallel.tp", par.tp, "num_attention_heads", "attention heads"),
        ("parallel.pp", par.pp, "num_hidden_layers", "layers"),
    ]
    for field, parts, key, what in divided:
        count = facts.get(key)
        if isinstance(count, int) and count % parts:
            fitting = [str(part) for part in range(1, count + 1) if count % part == 0]
            raise UserError(field, parts, f"use a divisor of the model's {count} {what}: {', '.join(fitting)}")


def _hf_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}  # a megatron checkpoint: its own metadata is checked where it is loaded
    try:
        facts = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(str(file), "(not JSON)", f"cannot be read: {error}") from error
    return facts if isinstance(facts, dict) else {}


def _data(config: Config) -> None:
    _source("data.source", config.data.source)
    if config.data.eval_source is not None:
        _source("data.eval_source", config.data.eval_source)
    replay = config.rollout.replay
    if replay is not None and not replay.is_dir():
        raise UserError(
            "rollout.replay", replay, "no such folder; give the rollouts/ folder of a run with rollout.save"
        )


def _source(field: str, source: str) -> None:
    if source.startswith("task:"):
        get_task(source.removeprefix("task:"))
    elif not source.endswith((".jsonl", ".parquet")):
        raise UserError(field, source, "give `task:NAME`, a .jsonl file or a .parquet file")
    elif not Path(source).is_file():
        raise UserError(field, source, "no such file")


def _devices(config: Config) -> None:
    gpus = gpu_names()
    if config.engine.device == "cuda" and not gpus:
        raise UserError("engine.device", "cuda", "this machine has no CUDA device; use auto or cpu")
    for name in ("fp8", "fp4"):
        if config.megatron.get(name) and not gpus:
            raise UserError(f"megatron.{name}", config.megatron[name], "needs a CUDA device; leave it out on a CPU")
    world = config.parallel.world_size
    if gpus and world > len(gpus) and "RANK" not in os.environ:
        raise UserError(
            "parallel.tp * pp * dp",
            world,
            f"this machine has {len(gpus)} GPUs; lower it, start torchrun over several machines, or run on the CPU "
            "with CUDA_VISIBLE_DEVICES= set to nothing",
        )


def _engine(config: Config) -> None:
    for url in config.engine.urls:
        if not url.startswith(("http://", "https://")):
            raise UserError("engine.urls", url, "write whole URLs, e.g. http://127.0.0.1:30000")
    if not needs_own_engine(config):
        return
    check_surroundings(config.engine, config.model.path)
    server_arguments(config.engine, config.model.path, config.model.dtype, config.sglang)
    if config.engine.port:
        _port_free(config.engine.host, config.engine.port)


def _port_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = f"cannot be bound on {host} ({error.strerror}); free it, or leave the field out for a free port"
            raise UserError("engine.port", port, remedy) from error


def _run_dir(config: Config) -> None:
    if any(part in config.name for part in ("/", "\\")) or config.name in ("", ".", ".."):
        raise UserError("name", config.name, "must be a plain folder name; the place is runs_dir")
    place = config.runs_dir
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError("runs_dir", config.runs_dir, f"{place} is not a folder that can be written to")


CHECKS: tuple[Callable[[Config], None], ...] = (_model, _shape, _data, _devices, _engine, _run_dir)
