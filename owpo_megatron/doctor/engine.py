"""SGLang: its environment, the servers that run already, and a real one that starts and draws tokens."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from owpo_megatron.config import EngineConfig
from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.engine.command import find_device, find_python
from owpo_megatron.engine.install import how_to_install
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.launch.preflight import needs_own_engine

PACKAGES = ("sglang", "torch", "transformers", "owpo-sglang-cpu")
SETUP = f"{how_to_install()}, or set engine.python to the interpreter of an environment with SGLang"
START_SECONDS = 120.0  # about 10 on two quiet cores

# What SGLang is asked to serve when only its start is of interest: a model of a few thousand random weights.
SMALL_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
SMALL_SERVER = {"load_format": "dummy", "max_running_requests": 2}


def environment(scope: Scope) -> Iterator[Finding]:
    """The packages of the interpreter that will run SGLang; or, where servers run already, whether they answer."""
    if scope.config is not None and not needs_own_engine(scope.config):
        for url in scope.config.engine.urls:
            yield _answers(url)
        return
    engine = scope.config.engine if scope.config else EngineConfig()
    python = find_python(engine)
    if not os.access(python, os.X_OK):
        yield Finding("engine", "fail", f"SGLang's environment is missing: no {python}", SETUP)
        return
    have = _packages(python)
    detail = ", ".join(f"{name} {version}" for name, version in have.items())
    if "sglang" not in have:
        yield Finding("engine", "fail", f"SGLang's environment is missing: {python} has no sglang", SETUP)
    elif "owpo-sglang-cpu" not in have and find_device(engine) == "cpu":
        remedy = f"{python} -m pip install --no-deps ./owpo_megatron/sglang_cpu"
        yield Finding("engine", "fail", f"{detail}; SGLang's CPU plug-in is missing", remedy)
    else:
        yield Finding("engine", "ok", detail)


def start(scope: Scope) -> Iterator[Finding]:
    """Start SGLang as the run will, but with a tiny random model, draw four tokens, and end it."""
    from owpo_megatron.engine import Server
    from owpo_megatron.types import Prompt, SampleRequest, Sampling

    if scope.config is not None and not needs_own_engine(scope.config):
        return
    config = scope.config.engine if scope.config else EngineConfig()
    limit = min(config.startup_timeout, START_SECONDS)
    small = config.model_copy(update={"port": 0, "tp": 1, "startup_timeout": limit, "request_timeout": 20.0})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="owpo-doctor-") as folder:
        model, log = Path(folder) / "model", Path(folder) / "engine.log"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SMALL_MODEL))
        try:
            server = Server(small, model, "float32", SMALL_SERVER, log)
        except UserError as error:
            yield Finding("engine start", "fail", f"{error.field} = {error.value}", error.remedy)
            return
        try:
            server.start()
            started = time.monotonic() - began
            prompt = Prompt(id="doctor", token_ids=(5, 6, 7), text="", answer="")
            request = SampleRequest(prompt, seed=1)
            drawn = server.client.generate([request], Sampling(max_tokens=4))[0].response_ids
        except EngineError as error:
            yield _not_started(str(error), time.monotonic() - began >= limit, limit)
            return
        finally:
            server.close()
    yield Finding("engine start", "ok", f"SGLang answered after {started:.1f} s and drew {len(drawn)} tokens")


def _not_started(error: str, waited: bool, limit: float) -> Finding:
    """A server that ended gives the reason; one that was still starting may only be slow."""
    by_hand = "start one by hand and read its output: owpo serve MODEL_DIR"
    if waited:
        detail = f"SGLang was still starting after {limit:g} s: this machine is slow or busy, or it hangs"
        return Finding("engine start", "warn", detail, by_hand)
    first, _, log_end = error.partition("\n")
    reason = next((line.strip() for line in reversed(log_end.splitlines()) if "Error" in line), first)
    return Finding("engine start", "fail", reason, by_hand)


def _packages(python: Path) -> dict[str, str]:
    code = (
        "import json, sys; from importlib import metadata\n"
        "have = {d.metadata['Name'].lower(): d.version for d in metadata.distributions()}\n"
        "print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
    )
    asked = subprocess.run([str(python), "-c", code, *PACKAGES], capture_output=True, text=True, timeout=60)
    return dict(json.loads(asked.stdout)) if asked.returncode == 0 else {}


def _answers(url: str) -> Finding:
    from owpo_megatron.engine import EngineClient

    client = EngineClient(url)
    try:
        return Finding("engine", "ok", f"{url} answers, SGLang {client.server_version()}")
    except EngineError as error:
        reason = str(error).partition("\n")[0]
        return Finding("engine", "fail", f"{url}: {reason}", "start it (owpo serve MODEL_DIR), or correct engine.urls")
    finally:
        client.close()
