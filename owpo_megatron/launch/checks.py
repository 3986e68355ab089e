"""Refuse jobs that cannot work before they wait in a queue."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.engine.command import find_python
from owpo_megatron.errors import UserError
from owpo_megatron.hub import download_command
from owpo_megatron.launch.job import Job, is_image_file
from owpo_megatron.launch.preflight import ENGINE_MEMORY, FILE_CHECKS, SAME_GPU


def check_job(job: Job) -> None:
    """Check everything that this machine knows about the job; imports no torch.

    Raises:
        UserError: the first thing that is missing or cannot work.
    """
    for check in CHECKS:
        check(job)


def check_downloads(job: Job, named: Config) -> None:
    """Check that the nodes see the models that the configuration names by hub, which this machine downloads.

    Args:
        named: the configuration before the names became folders of this machine.

    Raises:
        UserError: the container does not mount the folder.
    """
    pairs = [
        ("model.path", named.model.path, job.config.model.path),
        ("reference.path", named.reference.path, job.config.reference.path),
        *(
            (f"teachers ({one.name}) path", one.path, two.path)
            for one, two in zip(named.teachers, job.config.teachers, strict=True)
        ),
    ]
    for field, name, folder in pairs:
        if name is None or folder is None or name == folder or job.host_path(folder) is not None:
            continue
        copy = download_command(name)
        remedy = (
            f"the container does not see this machine's {folder}: run `{copy}` here, and set {field} to that folder"
        )
        raise UserError(field, name, remedy)


def check_model(job: Job) -> None:
    """Check that the parallel sizes divide the model. Imports torch and transformers, which takes seconds.

    Raises:
        UserError: they do not, or the model family is not supported.
    """
    from owpo_megatron.families import check_parallel, expert_shape, read_hf_config

    path = job.host_path(job.config.model.path)
    if path is not None:
        model = read_hf_config(hf_folder(path))
        check_parallel(model, job.config.parallel)
        if job.config.rollout.routing_replay:
            expert_shape(model)


def _name(job: Job) -> None:
    name = job.config.name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError("name", name, "use letters, digits, dot, dash and underscore only")
    if len(set(job.seeds)) < len(job.seeds):
        raise UserError("--seeds", ",".join(map(str, job.seeds)), "give each seed once")
    if job.seeds and job.links > 1:
        raise UserError(
            "--chain", job.links, "a chain continues one run; submit the seeds one by one, or leave --chain out"
        )


def _ranks(job: Job) -> None:
    launch, wanted = job.launch, job.config.parallel
    if job.world_size == wanted.world_size:
        return
    model = wanted.tp * wanted.cp * wanted.pp
    fitting = f"set parallel.dp={job.world_size // model}" if job.world_size % model == 0 else f"tp * cp * pp = {model}"
    raise UserError(
        "nodes * ranks per node",
        f"{launch.nodes} * {launch.ranks} = {job.world_size}",
        f"the configuration has parallel.tp * cp * pp * dp = {wanted.world_size}: {fitting}, or ask for other nodes",
    )


def _tensor_parallel(job: Job) -> None:
    gpus, tp = job.launch.gpus_per_node, job.config.parallel.tp
    if gpus and tp > job.launch.ranks:
        remedy = f"cannot exceed the {job.launch.ranks} ranks per node: it is slow across nodes; raise parallel.pp"
        raise UserError("parallel.tp", tp, remedy)


def _dtype(job: Job) -> None:
    if job.launch.gpus_per_node and job.config.model.dtype == "float32":
        remedy = "attention kernels of GPUs have no float32; set model.dtype=bfloat16 (masters stay float32)"
        raise UserError("model.dtype", "float32", remedy)


def _engines(job: Job) -> None:
    launch, config = job.launch, job.config
    if launch.engine_nodes and job.engine_place == "none":
        source = "rollout.replay" if config.rollout.replay else "engine.urls or engine.rendezvous"
        raise UserError(
            "launch.engine_nodes", launch.engine_nodes, f"{source} is set, so no engine is started; set it to 0"
        )
    if job.engine_place == "none" or not launch.gpus_per_node:
        return
    if launch.gpus_per_node % config.engine.tp:
        raise UserError("engine.tp", config.engine.tp, f"must divide the {launch.gpus_per_node} GPUs of a node")
    shared = job.engine_place == "trainer's nodes"
    if config.sync.transport == "ipc" and not shared:
        remedy = "only engines on the trainer's nodes can open its memory; use distributed for engine nodes, or tensor"
        raise UserError("sync.transport", "ipc", remedy)
    if config.sync.transport == "distributed" and shared:
        raise UserError("sync.transport", "distributed", SAME_GPU)
    if shared and not ENGINE_MEMORY & config.sglang.keys():
        raise UserError(
            "launch.engine_nodes",
            0,
            "engines share the trainer's GPUs: set sglang.mem_fraction_static to their share of the memory (e.g. 0.3), "
            "or give them nodes of their own with --engine-nodes",
        )


def _files(job: Job) -> None:
    if job.launch.container is None:
        for check in FILE_CHECKS:
            check(job.config)
        return
    model = job.host_path(job.config.model.path)
    if model is not None:
        hf_folder(model)


def _python(job: Job) -> None:
    if job.launch.container is not None:
        return
    wanted = [("launch.python", Path(job.python))]
    if job.num_engines:
        wanted.append(("engine.python", find_python(job.config.engine)))
    for field, python in wanted:
        if not os.access(python, os.X_OK):
            raise UserError(field, python, "no such interpreter; it must exist under this path on every node")


def _container(job: Job) -> None:
    image = job.launch.container
    if image is None:
        return
    if is_image_file(image) and not Path(image).exists():
        raise UserError("launch.container", image, "no such image file")
    for mount in job.launch.mounts:
        source = Path(mount.split(":")[0])
        if not source.exists():
            raise UserError("launch.mounts", mount, f"{source} does not exist")


def _time(job: Job) -> None:
    seconds = time_seconds(job.launch.time) if job.launch.time else None
    if seconds is not None and seconds <= job.launch.signal_seconds:
        raise UserError(
            "launch.time",
            job.launch.time,
            f"must exceed launch.signal_seconds = {job.launch.signal_seconds}, the time reserved for saving",
        )


def time_seconds(text: str) -> int:
    """Seconds of a time limit, as sbatch reads it.

    Example:
        >>> time_seconds("90"), time_seconds("1:30"), time_seconds("4:00:00"), time_seconds("1-12")
        (5400, 90, 14400, 129600)
    """
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = [0, *parts][-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def require_command(name: str) -> None:
    """Raises UserError if a cluster command is not installed here."""
    if shutil.which(name) is None:
        raise UserError(name, "(missing)", "no such command here; submit from a login node, or use --dry-run")


CHECKS: tuple[Callable[[Job], None], ...] = (
    *(_name, _ranks, _tensor_parallel, _dtype, _engines, _files, _python, _container, _time),
)
