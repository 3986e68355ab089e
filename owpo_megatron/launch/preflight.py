"""Cheap checks before a run starts: mistakes that would otherwise show up minutes later, on a rank or in the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from owpo_megatron.carried import PREFIX, is_carried
from owpo_megatron.config import Config, hf_folder
from owpo_megatron.data import check_source
from owpo_megatron.data.tokenizer import check_tokenizer_files
from owpo_megatron.engine.command import check_environment, find_device, server_arguments
from owpo_megatron.engine.context import check_context_length
from owpo_megatron.engine.server import probe_port
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.sets import check_sets
from owpo_megatron.families import supported_family
from owpo_megatron.families.config_file import refuse_multimodal
from owpo_megatron.launch.job import needs_own_engine
from owpo_megatron.launch.machine import gpu_names, usable_gpus
from owpo_megatron.launch.preview import check_prompts
from owpo_megatron.launched import started_by_torchrun
from owpo_megatron.methods import find_method
from owpo_megatron.sinks import check_installed

ENGINE_MEMORY = frozenset({"mem_fraction_static", "max_total_tokens"})
"""Arguments of SGLang that bound what an engine takes of a GPU."""
SAME_GPU = (
    "an engine shares global rank 0's GPU, and NCCL takes a GPU into a group once; use ipc on one node, tensor on more "
    "or give engines GPUs of their own"
)

_FIND_RULE = """
import sys
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.rules import find_rule
try:
    find_rule(sys.argv[1])
except UserError as error:
    sys.exit(error.remedy if error.field == "verifier.rule" else str(error))
"""


def preflight(config: Config) -> None:
    """Check everything that a run needs on this machine. Imports no torch and reads no weights.

    Raises:
        UserError: the first thing that is missing or cannot work.
    """
    for check in CHECKS:
        check(config)


def _model(config: Config) -> None:
    files = hf_folder(config.model.path)
    refuse_multimodal(files, "model.path")
    supported_family(files)
    if config.reference.path is not None:
        hf_folder(config.reference.path, "reference.path")
    for teacher in config.teachers:
        if teacher.path is not None:
            hf_folder(teacher.path, f"teachers ({teacher.name}) path")


def _tokenizer(config: Config) -> None:
    check_tokenizer_files(hf_folder(config.model.path))


def _teacher(config: Config) -> None:
    """Refuse distillation from the initial policy itself: its log-ratio to the policy is 0, there is nothing to learn.

    A method that also uses rewards may learn from its own earlier policies, which swaps make its teacher.
    """
    method, reference = find_method(config.algorithm.name), config.reference
    if method.reference != "teacher" or config.teachers or reference.path is not None:
        return
    if reference.refresh == "fixed" or not method.uses_rewards:
        remedy = f"{method.name} would learn from its own initial policy; set reference.path (e.g. best/ of a run)"
        swaps = ", or reference.refresh: interval or best_of_stage" if method.uses_rewards else ""
        raise UserError("teachers", "(none)", f"{remedy} or teachers{swaps}")


def _data(config: Config) -> None:
    for part in config.data.parts:
        check_source(part.source, columns=config.data.columns if part.columns is None else part.columns)
    if config.data.eval_source is not None:
        check_source(config.data.eval_source, "data.eval_source", config.data.columns)
    for source in config.data.against:
        check_source(source, "data.against")
    check_sets(config.eval)
    replay = config.rollout.replay
    if replay is not None and not replay.is_dir():
        raise UserError(
            "rollout.replay", replay, "no such folder; give the rollouts/ folder of a run with rollout.save"
        )


def _prompts(config: Config) -> None:
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        check_prompts(config)


def _context(config: Config) -> None:
    if config.rollout.replay is None:
        check_context_length(config)


def _rules(config: Config) -> None:
    """Find rules of the user's own as a rank will, in the working folder; a process of its own keeps this one small."""
    fields = {"verifier.rule": config.verifier.rule, "verifier.audit": config.verifier.audit}
    fields["eval.chain"] = config.eval.chain
    for one in config.eval.sets:
        fields |= {f"eval.sets.{one.name}.rule": one.rule, f"eval.sets.{one.name}.chain": one.chain}
    for field, rule in fields.items():
        if rule is None or is_carried(rule) or not rule.startswith((PREFIX, "judge:", "ensemble:")):
            continue
        done = subprocess.run([sys.executable, "-c", _FIND_RULE, rule], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["its import ended the process"]
            raise UserError(field, rule, lines[-1])


def _megatron(config: Config) -> None:
    """Refuse incomplete recomputation as megatron-core does; ranks and `owpo plan` check the other raw fields."""
    raw = config.megatron
    if raw.get("recompute_granularity") != "full":
        return
    complete = "full recomputation needs megatron.recompute_method uniform (or block) and megatron.recompute_num_layers"
    if raw.get("recompute_method") not in ("uniform", "block"):
        raise UserError("megatron.recompute_method", raw.get("recompute_method"), f"{complete}, e.g. uniform and 1")
    if not raw.get("recompute_num_layers"):
        raise UserError("megatron.recompute_num_layers", raw.get("recompute_num_layers"), f"{complete}, e.g. 1")


def _devices(config: Config) -> None:
    gpus = usable_gpus()
    if config.engine.device == "cuda" and not gpu_names():
        raise UserError("engine.device", "cuda", "this machine has no CUDA device; use auto or cpu")
    if gpus and config.model.dtype == "float32":
        remedy = "attention kernels of GPUs have no float32; set model.dtype=bfloat16 (masters stay float32)"
        raise UserError("model.dtype", "float32", remedy)
    own_engine = bool(gpus) and needs_own_engine(config) and find_device(config.engine) == "cuda"
    if own_engine and not ENGINE_MEMORY & config.sglang.keys():
        remedy = (
            "the run's engine shares the trainer's GPUs and would take most of their memory; set "
            "sglang.mem_fraction_static to its share (e.g. 0.3; owpo plan shows what fits)"
        )
        raise UserError("sglang.mem_fraction_static", None, remedy)
    for name in ("fp8", "fp4"):
        if config.megatron.get(name) and not gpus:
            raise UserError(f"megatron.{name}", config.megatron[name], "needs a CUDA device; leave it out on a CPU")
    world = config.parallel.world_size
    if started_by_torchrun() and os.environ["WORLD_SIZE"] != str(world):
        remedy = f"torchrun started so many ranks, and parallel.tp * cp * pp * dp is {world}; make them equal"
        raise UserError("WORLD_SIZE", os.environ["WORLD_SIZE"], remedy)
    if gpus and world > len(gpus) and not started_by_torchrun():
        raise UserError(
            "parallel.tp * cp * pp * dp",
            world,
            f"this machine has {len(gpus)} GPUs; lower it, use several machines (owpo launch, or torchrun), or run on "
            "the CPU with an empty CUDA_VISIBLE_DEVICES=",
        )


def _engine(config: Config) -> None:
    if config.engine.urls and config.engine.rendezvous is not None:
        raise UserError(
            "engine.rendezvous",
            config.engine.rendezvous,
            "leave out either this or engine.urls",
        )
    if config.engine.router and (config.engine.urls or config.engine.rendezvous):
        raise UserError(
            "engine.router",
            config.engine.router,
            "leave out engine.urls and engine.rendezvous beside it",
        )
    for field, urls in (("urls", config.engine.urls), ("router", [config.engine.router or "http://"])):
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"engine.{field}", url, "write whole URLs, e.g. http://127.0.0.1:30000")
    if not needs_own_engine(config):
        return
    files = hf_folder(config.model.path)
    check_environment(config.engine, files)
    server_arguments(config.engine, files, config.model.dtype, config.sglang)
    if config.engine.port:
        for index in range(config.engine.count):
            _port_free(config.engine.host, config.engine.port + index)


def _turns(config: Config) -> None:
    if not config.engine.in_turn:
        return
    if needs_own_engine(config) and find_device(config.engine) != "cuda":
        raise UserError("engine.in_turn", True, "releases memory of CUDA devices; leave it out on a CPU")
    waits = {"rollout.max_staleness": config.rollout.max_staleness, "launch.engine_nodes": config.launch.engine_nodes}
    for field, value in waits.items():
        if value:
            raise UserError(
                "engine.in_turn", True, f"engines wait while the policy trains; set {field} 0, or leave it out"
            )


def _sync(config: Config) -> None:
    sync, gpus = config.sync, usable_gpus()
    on_cuda = bool(gpus) and config.engine.device != "cpu"
    if sync.transport == "ipc" and not on_cuda:
        remedy = "CUDA IPC needs CUDA memory; use tensor, which shares host memory with the run's own engines"
        raise UserError("sync.transport", "ipc", remedy)
    if sync.transport == "distributed" and on_cuda and needs_own_engine(config) and "base_gpu_id" not in config.sglang:
        raise UserError("sync.transport", "distributed", SAME_GPU)
    if sync.fp8 and not on_cuda:
        raise UserError("sync.fp8", True, "SGLang runs FP8 on CUDA devices; leave it out on a CPU")
    if sync.fp8 and config.model.dtype != "bfloat16":
        raise UserError("sync.fp8", True, "engines in FP8 compute in bfloat16; set model.dtype bfloat16")
    if sync.delta and (config.engine.urls or config.engine.router):
        remedy = (
            "servers given by URL keep no replica to apply changes to; start them with owpo serve --rendezvous FOLDER "
        )
        raise UserError("sync.delta", True, remedy + "and set engine.rendezvous, or leave it out")
    if sync.verify == "hash" and on_cuda:
        raise UserError("sync.verify", "hash", "SGLang hashes CUDA tensors differently; use logprob")
    if "quantization" in config.sglang:
        remedy = "an engine that quantises its own weights cannot be updated; leave it out and set sync.fp8"
        raise UserError("sglang.quantization", config.sglang["quantization"], remedy)
    if config.engine.count > 1 and not needs_own_engine(config):
        raise UserError("engine.count", config.engine.count, "the run starts no engines of its own; leave it out")


def _port_free(host: str, port: int) -> None:
    try:
        probe_port(host, port)
    except OSError as error:
        remedy = f"cannot be bound on {host} ({error.strerror}); free it, or leave the field out for a free port"
        raise UserError("engine.port", port, remedy) from error


def _sinks(config: Config) -> None:
    check_installed(config)


def _run_dir(config: Config) -> None:
    if any(part in config.name for part in ("/", "\\")) or config.name in ("", ".", ".."):
        raise UserError("name", config.name, "must be a plain folder name; its parent folder is runs_dir")
    place = config.runs_dir
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError("runs_dir", config.runs_dir, f"{place} is not a folder that can be written to")


CHECKS: tuple[Callable[[Config], None], ...] = (
    *(_model, _tokenizer, _teacher, _context, _data, _prompts, _rules, _megatron),
    *(_devices, _turns, _engine, _sync, _sinks, _run_dir),
)
# The checks that hold on a login node, for a run on other machines: a config.json is enough of the model there.
FILE_CHECKS: tuple[Callable[[Config], None], ...] = (
    *(_model, _teacher, _context, _data, _prompts, _rules, _megatron, _run_dir),
)
