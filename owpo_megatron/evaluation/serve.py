"""Evaluate weights on disk: SGLang serves them from a Hugging Face folder, without a trainer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.data import Tokenizer
from owpo_megatron.engine import Fleet, Server, start_fleet
from owpo_megatron.engine.answers import UNKNOWN_VERSION
from owpo_megatron.engine.command import server_raw
from owpo_megatron.environments import EnvironmentBuilder
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.chains import chain_verifier
from owpo_megatron.evaluation.draw import Answering, DrawProgress, evaluate_set, identity
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.results import Results
from owpo_megatron.run.layout import MANIFEST
from owpo_megatron.types import RolloutEngine, Verifier
from owpo_megatron.verifiers import KnownVerdicts
from owpo_megatron.verifiers.build import make_verifier

log = logging.getLogger(__name__)
_WEIGHTS = ("*.safetensors", "*.bin", "state/*.distcp")
DEFAULT_MAX_TOKENS = 8192  # per response
_SAMPLED_BYTES = 1 << 20  # read from the start and from the end of a file of weights


def evaluate_weights(
    weights: Path,
    served: Callable[[], AbstractContextManager[Path]],
    config: Config,
    sets: Sequence[PreparedSet],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    out: Path,
    fresh: bool = False,
    progress: Callable[[PreparedSet], DrawProgress | None] = lambda prepared: None,
    waiting: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> list[dict[str, Any]]:
    """Evaluate weights on sets and return their scores, in order; results are in OUT/SET.json and OUT/SET.jsonl.

    Samples of an earlier call with the same settings are not drawn again; if none is missing, no engine is started.

    Args:
        weights: an HF folder, a converted folder or a run's checkpoint.
        served: context that yields the HF folder of these weights, for as long as the engine needs it.
        config: uses engine, verifier, sglang, model.dtype, and for episodes environment and data. Servers given by URL
            load the weights from the HF folder,
            which they must see under the same path.
        waiting: is entered with what takes long before the first sample is drawn.

    Raises:
        UserError: `out` contains results of another evaluation, or the engine's environment is unusable.
        EngineError: the engine does not start, or stays dead.
    """
    mark = fingerprint(weights)
    results = [
        Results(
            out,
            one.spec.name,
            identity(one, mark, max_tokens, seed) | _environment_of(config),
            keep_responses=not one.spec.confidential,
            fresh=fresh,
        )
        for one in sets
    ]
    if all(kept.scores is not None for kept in results):
        return [dict(kept.scores or {}) for kept in results]
    rules = {domain: rule for one in sets for domain, rule in one.rules.items()}
    with ExitStack() as stack:
        episodes = None
        if config.environment is not None:
            episodes = EnvironmentBuilder(config, tokenizer, None, log.warning, stack)
        running = config.engine.urls or config.engine.router or config.engine.rendezvous
        with waiting("loading the weights into the servers" if running else f"starting SGLang ({out / 'logs'})"):
            model = stack.enter_context(served())
            fleet = stack.enter_context(
                start_fleet(config.engine, model, config.model.dtype, server_raw(config), out / "logs", with_keys=True)
            )
            if not isinstance(fleet.engines[0], Server):
                fleet.own_weights()
                fleet.on_restart = partial(_load, fleet, model)
                fleet.on_restart()
        verifier: Verifier = make_verifier(config.verifier, (), rules)
        stack.callback(verifier.close)
        if (chains := chain_verifier(config.verifier, sets)) is not None:
            stack.callback(chains.close)
        stop = tuple(config.rollout.stop)
        engine: RolloutEngine = fleet
        if episodes is not None:
            engine, verifier = episodes.over(fleet), KnownVerdicts(verifier)
        answering = Answering(engine, verifier, tokenizer.decode, tokenizer.eos_ids, max_tokens, seed, stop, chains)
        return [evaluate_set(one, answering, kept, progress(one)) for one, kept in zip(sets, results, strict=True)]


def _environment_of(config: Config) -> dict[str, Any]:
    """Identity of an evaluation with turns."""
    return {} if config.environment is None else {"environment": config.environment.model_dump(mode="json")}


def _load(fleet: Fleet, model: Path) -> None:
    """Load these weights into servers started by others."""
    for client in fleet.clients:
        client.pause()
        client.flush()
        client.set_version(UNKNOWN_VERSION)
        client.update_from_disk(str(model.absolute()))
        client.set_version(0)
        client.resume()


def fingerprint(weights: Path) -> str:
    """Fingerprint an HF folder, a converted folder or a checkpoint.

    Hashes the manifest if there is one, else the names, sizes and both ends of the weight files, which takes no time.

    Raises:
        UserError: the folder has no weights.
    """
    manifest = weights / MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    files = weight_files(weights)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
            stream.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def weight_files(weights: Path) -> list[Path]:
    """The files of weights in a folder. Raises UserError where there is none."""
    files = sorted(file for pattern in _WEIGHTS for file in weights.glob(pattern))
    if not files:
        raise UserError("model", weights, "has no weights; name an HF folder, a converted folder or a run's checkpoint")
    return files


def response_limit(
    files: Path, sets: Sequence[PreparedSet], wanted: int | None, default: int = DEFAULT_MAX_TOKENS
) -> int:
    """Return the maximum response length in tokens.

    This is `wanted`, else `default` or what the model's context leaves after the longest prompt, if that is less.

    Raises:
        UserError: `wanted` exceeds the room in the context, or there is no room.
    """
    longest = max(len(prompt.token_ids) for one in sets for prompt in one.prompts)
    context = json.loads((files / "config.json").read_text()).get("max_position_embeddings")
    room = (context or 1 << 30) - longest
    if room <= 0 or (wanted is not None and wanted > room):
        raise UserError(
            "--max-tokens",
            wanted or default,
            f"the model's context is {context} tokens and the longest prompt has {longest}; at most {max(room, 0)}",
        )
    return wanted or min(room, default)


def stored_dtype(files: Path) -> str:
    """Return "float32" or "bfloat16", from the dtype in config.json (float16 is served as bfloat16)."""
    raw = json.loads((files / "config.json").read_text())
    return "float32" if (raw.get("dtype") or raw.get("torch_dtype")) in (None, "float32") else "bfloat16"
