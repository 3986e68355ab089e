"""owpo serve"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape

from owpo_megatron.cli.options import err, out
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="HF checkpoint folder.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Arguments of SGLang itself, e.g. max_total_tokens=8192."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 30000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tp: Annotated[int, typer.Option(help="Ranks that share the model.")] = 1,
    python: Annotated[Path | None, typer.Option(metavar="FILE", help="SGLang's python; else .venv-engine's.")] = None,
    log: Annotated[Path, typer.Option(metavar="FILE", help="Where the server's own output goes.")] = Path("engine.log"),
) -> None:
    """Start an engine for a model and keep it in the foreground, for runs with engine.urls=[URL].

    Ctrl-C ends it. SGLang gets the arguments that a run would give it; NAME=VALUE changes or adds some.

    Example: owpo serve cache/quickstart/cipher --device cpu max_running_requests=64
    """
    from owpo_megatron.rollout.server import Server

    config = Config.build(
        {
            "model": {"path": model, "dtype": dtype},
            "data": {"source": "-"},
            "engine": {"host": host, "port": port, "device": device, "tp": tp, "python": python},
            "sglang": dict(_argument(text) for text in arguments or []),
        }
    )
    server = Server(config.engine, config.model.path, config.model.dtype, config.sglang, log)
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    out.print(f"starting SGLang for {escape(str(model))} (its output: {escape(str(log))}) ...")
    try:
        server.start()
        url = server.client.url
        out.print(f"serving at [bold]{url}[/bold] (a run uses it with engine.urls={escape(f'[{url}]')})")
        while not stopped and server.is_running():
            time.sleep(0.2)
    finally:
        server.close()
    if not stopped:
        err.print(f"[bold red]failed:[/bold red] the server ended; the end of {escape(str(log))}:", markup=True)
        err.print(server.log_tail(), markup=False)
        raise typer.Exit(1)


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError("argument", text, "write it as NAME=VALUE, e.g. max_total_tokens=8192")
    return name, yaml.safe_load(value)
