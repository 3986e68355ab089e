"""Start the configured engines, or connect to engines started by others."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.command import find_device
from owpo_megatron.engine.fleet import Fleet
from owpo_megatron.engine.members import UrlEngine
from owpo_megatron.engine.rendezvous import announced_engines
from owpo_megatron.engine.server import Server
from owpo_megatron.errors import EngineError, UserError


def start_fleet(
    config: EngineConfig,
    model_path: Path,
    dtype: str,
    raw: Mapping[str, Any],
    log_dir: Path,
    on_restart: Callable[[], None] | None = None,
    variables: Mapping[str, str] = {},
    with_keys: bool = False,
) -> Fleet:
    """Return the configured engines.

    These are the servers at `config.urls`, those behind `config.router`, those that announce themselves in
    `config.rendezvous`, or `config.count` servers of our own that log to log_dir/engine_N.log.

    Args:
        with_keys: servers of our own answer only to this fleet; without, any user of the machine may load weights into
            them.

    Raises:
        UserError: a URL or the router does not answer, or interpreter, SGLang, model or port are unusable.
        EngineError: a server of our own, or one that was to announce itself, does not start.
    """
    if config.rendezvous is not None:
        return Fleet(announced_engines(config.rendezvous, config), config, on_restart)
    if config.router is not None:
        front = EngineClient(config.router, config.request_timeout)
        try:
            urls = front.workers()
        except EngineError as error:
            raise UserError("engine.router", config.router, f"no sglang-router answers: {error}") from error
        if not urls:
            raise UserError(
                "engine.router", config.router, "has no healthy workers; add them and wait until /workers lists them"
            )
        return Fleet([UrlEngine(url, config) for url in urls], config, on_restart, front)
    if config.urls:
        engines = [UrlEngine(url, config) for url in config.urls]
        for engine in engines:
            try:
                engine.client.model_info(timeout=30.0)
            except EngineError as error:
                raise UserError("engine.urls", engine.client.url, f"no SGLang server answers: {error}") from error
        return Fleet(engines, config, on_restart)
    servers = [
        _server(index, config, model_path, dtype, raw, log_dir, variables, with_keys) for index in range(config.count)
    ]
    with contextlib.ExitStack() as on_failure:
        for server in servers:
            on_failure.callback(server.close)
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(Server.start, servers))
        on_failure.pop_all()
    return Fleet(servers, config, on_restart)


def _server(
    index: int,
    config: EngineConfig,
    model_path: Path,
    dtype: str,
    raw: Mapping[str, Any],
    log_dir: Path,
    variables: Mapping[str, str],
    with_key: bool,
) -> Server:
    """Create server `index` of this machine, with its own port, log and, on CUDA, `engine.tp` GPUs."""
    own: dict[str, Any] = {}
    if config.count > 1:
        config = config.model_copy(update={"port": config.port + index if config.port else 0})
        own = {"base_gpu_id": index * config.tp} if find_device(config) == "cuda" else {}
    key = secrets.token_hex(32) if with_key else None
    return Server(config, model_path, dtype, {**own, **raw}, log_dir / f"engine_{index}.log", key, variables)
