"""Build the command line and the environment of an `sglang.launch_server` from the configuration."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config, EngineConfig
from owpo_megatron.engine.install import PACKAGE, engine_home, how_to_install
from owpo_megatron.errors import UserError
from owpo_megatron.launched import own_environment

# Arguments set by `engine` and `model` of the configuration (the field), or by the server's supervision (None).
OWNED = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "device": "engine.device",
    "host": "engine.host",
    "port": "engine.port",
    "tp": "engine.tp",
    "tp_size": "engine.tp",
    "tensor_parallel_size": "engine.tp",
    "served_model_name": None,
    "weight_version": None,
    "config": None,
    "api_key": None,
}
DEVICES = Path("/dev")
BOUND_STORE = Path(__file__).with_name("bound_store.py")  # runs the server's module; not imported: it needs torch
# For weights below this size one thread is faster than synchronising several. The trainer's ranks sleep meanwhile.
ONE_THREAD_BYTES = 8 << 20


def find_python(config: EngineConfig) -> Path:
    """Return the Python of SGLang's environment: the configured one, that of `engine_home()`, or this one."""
    if config.python is not None:
        # absolute, not resolved: a virtual environment's python is a link and finds its packages only by that path
        return config.python.absolute()
    own = engine_home() / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def find_device(config: EngineConfig) -> str:
    """Return "cpu" or "cuda"; "auto": a GPU that this process may use, and an engine whose torch can use it."""
    if config.device != "auto":
        return config.device
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = shown is not None and re.match(r"\s*(\d|GPU-|MIG-)", shown) is None  # "", -1, NoDevFiles, ...
    visible = any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()
    return "cuda" if visible and not hidden and built_for_cuda(find_python(config)) else "cpu"


@functools.cache
def built_for_cuda(python: Path) -> bool:
    """Whether that interpreter's torch is a CUDA build. Its version file is read; importing torch takes seconds."""
    where = "import importlib.util as u; found = u.find_spec('torch'); print(found.origin if found else '')"
    done = subprocess.run([python, "-c", where], capture_output=True, text=True, timeout=60)
    version = Path(done.stdout.strip()).with_name("version.py") if done.stdout.strip() else None
    if version is None or not version.is_file():
        return False
    return re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.MULTILINE) is not None


def check_environment(config: EngineConfig, model_path: Path) -> None:
    """Check interpreter, packages and model before anything starts.

    Raises:
        UserError: the interpreter is missing or lacks SGLang (on a CPU, also the plug-in), or the model is missing.
    """
    check_interpreter(config)
    if not (model_path / "config.json").is_file():
        raise UserError("model.path", model_path, "no HF checkpoint there; name a folder with a config.json")


def check_interpreter(config: EngineConfig) -> None:
    """Check interpreter and packages only, for when there is no model yet."""
    python = find_python(config)
    if not os.access(python, os.X_OK):
        raise UserError("engine.python", python, f"no such interpreter; {how_to_install()}, or name one with SGLang")
    packages = ["sglang"] + (["owpo-sglang-cpu"] if find_device(config) == "cpu" else [])
    code = "import importlib.metadata, sys\nfor name in sys.argv[1:]: importlib.metadata.version(name)"
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    if found.returncode:
        missing = "owpo-sglang-cpu" if "owpo-sglang-cpu" in found.stderr else "sglang"
        remedy = {
            "sglang": f"has no sglang; {how_to_install()}, or name the interpreter of an environment that has it",
            "owpo-sglang-cpu": f"lacks SGLang's CPU plug-in; run {python} -m pip install --no-deps "
            + os.path.relpath(PACKAGE / "sglang_cpu"),
        }
        raise UserError("engine.python", python, remedy[missing])


def server_raw(config: Config) -> dict[str, Any]:
    """The `sglang` section, and before it what other sections ask of the server.

    Texts that end a response need a tokenizer there, since it has to decode for that. Without determinism, the
    default there, a GPU's server draws without seeds; a CPU's keeps them (`server_variables`).
    """
    raw: dict[str, Any] = {"skip_tokenizer_init": False} if config.rollout.stop else {}
    if config.rollout.routing_replay:
        raw["enable_return_routed_experts"] = True
    if config.rollout.deterministic is not True and find_device(config.engine) == "cuda":
        raw["enable_deterministic_inference"] = False
    if config.engine.in_turn:
        raw["enable_memory_saver"] = True
    return raw | config.sglang


def server_variables(config: Config) -> dict[str, str]:
    """Environment variables of the server that a run's sections ask for."""
    return {"OWPO_BATCH_INVARIANT": "0"} if config.rollout.deterministic is False else {}


def server_arguments(config: EngineConfig, model_path: Path, dtype: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's arguments by name; `raw` (the config's `sglang` section) overrides the defaults.

    Raises:
        UserError: `raw` sets an argument that has a field of its own in the configuration.
    """
    for name in raw:
        owner = OWNED.get(name.replace("-", "_"), name)
        if owner is None:
            raise UserError(f"sglang.{name}", raw[name], "set by the run itself; remove it")
        if owner != name:
            raise UserError(f"sglang.{name}", raw[name], f"set {owner} instead")
    arguments: dict[str, Any] = {
        "model_path": str(model_path.absolute()),
        "dtype": dtype,
        "device": find_device(config),
        "host": config.host,
        "tp_size": config.tp,
        # Without it, the seeds of single requests are ignored.
        "enable_deterministic_inference": True,
        # Only token ids are exchanged with the engine.
        "skip_tokenizer_init": True,
        "weight_version": "0",
        "max_running_requests": config.concurrency,
        # Python's own; given, the server collects no garbage among its imports (engine/bound_store.py).
        "gc_threshold": [700, 10, 10],
    }
    if arguments["device"] == "cpu":
        arguments |= {
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_overlap_schedule": True,
            # One cache for layers with and without a window: plain PyTorch attention knows no other.
            "disable_hybrid_swa_memory": True,
            # An idle scheduler would otherwise keep a core busy that the trainer needs.
            "sleep_on_idle": True,
            "skip_server_warmup": True,
            # An upper bound; max_total_tokens sizes the cache.
            "mem_fraction_static": 0.5,
            "max_total_tokens": 32768,
        }
    return arguments | {name.replace("-", "_"): value for name, value in raw.items()}


def command_line(python: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Convert `{"max_total_tokens": 8192, "sleep_on_idle": True}` to a command; False and None omit an argument."""
    command = [str(python), str(BOUND_STORE), "sglang.launch_server"]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command.append(flag)
        elif isinstance(value, dict):
            command += [flag, json.dumps(value)]
        elif isinstance(value, list):
            command += [flag, *map(str, value)]
        elif value is not None and value is not False:
            command += [flag, str(value)]
    return command


def environment(config: EngineConfig, model_path: Path, variables: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the environment variables of the server's process; `variables` are added to them."""
    env = own_environment()  # with torchrun's variables the engine's process group would join the trainer's
    env.pop("OMP_NUM_THREADS", None)
    env.setdefault("PYTHONFAULTHANDLER", "1")  # SIGABRT: the stacks of all threads go to the log
    if find_device(config) == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        threads = max(1, len(cores) // config.tp)
        size = sum(path.stat().st_size for path in model_path.glob("*.safetensors"))
        env["OMP_NUM_THREADS"] = "1" if size < ONE_THREAD_BYTES else str(threads)
        if config.tp > 1:
            shares = [cores[rank * threads % len(cores) :][:threads] for rank in range(config.tp)]
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return env | dict(variables)
