"""owpo serve"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.markup import escape

from owpo_megatron.cli.options import err, load_config, note, out, writable
from owpo_megatron.config import Config, hf_folder
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.hub import model_folder

if TYPE_CHECKING:
    from owpo_megatron.engine import Server
    from owpo_megatron.environments.endpoint import ChatEndpoint
    from owpo_megatron.sync.delta.replica import Mirror


def serve(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL_DIR | NAME=VALUE",
            help="HF checkpoint folder, or OWNER/NAME on the hub, unless -c names it; then arguments of SGLang, "
            "e.g. max_total_tokens=8192.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Serve as the run of this file would.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 30000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Interpreter of SGLang's environment; default: .venv-engine.")
    ] = None,
    log: Annotated[Path, typer.Option(metavar="FILE", help="File for the server's output.", callback=writable)] = Path(
        "engine.log"
    ),
    rendezvous: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Announce the engine in this folder, with a key, for runs with engine.rendezvous=FOLDER.",
        ),
    ] = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm", help="With -c: keep the engine for runs of this file on this machine, which start in seconds."
        ),
    ] = False,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="HOST", help="Host name or address by which other machines reach this one; default: its host name."
        ),
    ] = None,
    index: Annotated[int, typer.Option(min=0, help="With --rendezvous: the engine's number, from 0.")] = 0,
    mirror: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --rendezvous: where a copy of the weights is kept for runs with sync.delta; else sync.mirror.",
        ),
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="Restarts after the server ends by itself.")] = 0,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Answer agents by the OpenAI chat protocol, and keep their sessions' tokens and log-probs in this "
            "folder, for runs with rollout.replay=FOLDER/rollouts.",
        ),
    ] = None,
    record_port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --record: port of the agents; 0 takes a free one.")
    ] = 0,
) -> None:
    """Start an engine for a model and keep it in the foreground, for runs with engine.urls=[URL].

    Ctrl-C ends it. SGLang gets the arguments that a run would give it; NAME=VALUE changes or adds some. On another
    machine than the run's: --host 0.0.0.0 --rendezvous FOLDER, a folder that both machines see.

    Example: owpo serve cache/quickstart/cipher --device cpu max_running_requests=64
    Example: owpo serve -c examples/quickstart/config.yaml --warm      # runs of that file find it by themselves
    """
    from owpo_megatron.engine import Server

    words = list(words or [])
    if config is None:
        if not words or "=" in words[0] and not Path(words[0]).is_dir():
            raise UserError("MODEL_DIR", " ".join(words[:1]) or "(missing)", "give an HF checkpoint folder, or -c FILE")
        model = {"path": model_folder(Path(words.pop(0)), "MODEL_DIR", note), "dtype": dtype}
        engine = {"device": device, "tp": tp, "python": python}
        settings = Config.build({"model": model, "data": {"source": "-"}, "engine": engine})
    else:
        settings = load_config(config, [])
    in_turn: dict[str, Any] = {"enable_memory_saver": True} if settings.engine.in_turn else {}
    arguments = in_turn | settings.sglang | dict(_argument(word) for word in words)
    model_files = hf_folder(settings.model.path, "MODEL_DIR" if config is None else "model.path")
    variables: dict[str, str] = {}
    if warm:
        if config is None or rendezvous is not None or words:
            raise UserError("--warm", True, "needs -c FILE, and neither --rendezvous nor arguments; set fields in FILE")
        port = 0
        arguments, variables, rendezvous = _as_in_a_run(settings, model_files)
    elif settings.sync.fp8:
        from owpo_megatron.sync import fp8_engine_arguments

        arguments |= fp8_engine_arguments(arguments)
    engine_settings = settings.engine.model_copy(update={"host": host, "port": port})
    key = secrets.token_hex(32) if rendezvous is not None else None
    try:
        server = Server(engine_settings, model_files, settings.model.dtype, arguments, log, key, variables)
    except UserError as error:
        if rendezvous is not None:
            _announce_failure(rendezvous, index, str(error))
        raise
    out.print(f"starting SGLang for {escape(str(model_files))} (its output: {escape(str(log))}) ...")
    beside = _mirror(host, key, mirror or settings.sync.mirror) if key is not None else None
    agents = None
    if record is not None:
        from owpo_megatron.cli.recording import record_sessions

        agents = record_sessions(settings, model_files, server.client, record, host, record_port, chats=config is None)
        url = f"http://{advertise or _reachable(host)}:{agents.port}/v1"
        out.print(f"agents ask [bold]{url}[/bold] (OPENAI_BASE_URL); their sessions go to {escape(str(record))}")
    _Service(server, advertise or _reachable(host), rendezvous, index, key, beside, warm, agents).run(restarts)


class _Service:
    """The engine in the foreground, announced while it answers."""

    def __init__(
        self,
        server: Server,
        host: str,
        rendezvous: Path | None,
        index: int,
        key: str | None,
        mirror: Mirror | None,
        warm: bool,
        agents: ChatEndpoint | None,
    ):
        self._warm = warm
        self._server, self._host, self._key, self._mirror, self._agents = server, host, key, mirror, agents
        self._rendezvous, self._index = rendezvous, index
        self._stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, restarts: int) -> None:
        """Until a signal, or until the engine has ended once more than `restarts` times."""
        try:
            for left in reversed(range(restarts + 1)):
                self._server.restart()
                if self._agents is not None:
                    self._server.client.set_version(0)  # the weights as they were read
                self._say_where()
                while not self._stopped and self._server.is_running():
                    time.sleep(0.2)
                if self._stopped:
                    return
                self._withdraw()
                err.print("[bold red]the server ended;[/bold red] the last lines of its output:", markup=True)
                err.print(self._server.log_tail(), markup=False)
                if left:
                    err.print(f"restarting it ({left} restarts left)")
            if self._rendezvous is not None:
                _announce_failure(self._rendezvous, self._index, "it ended by itself; see its log")
            raise typer.Exit(1)
        except EngineError as error:
            if self._stopped:  # a cluster ends the server's processes together with this one
                return
            if self._rendezvous is not None:
                said, *log = str(error).splitlines()
                last = f": {log[-1]}" if log else ""
                _announce_failure(self._rendezvous, self._index, said.partition("; the end of")[0] + last)
            raise
        finally:
            if self._agents is not None:
                self._agents.close()
            self._server.close()
            if self._mirror is not None:
                self._mirror.close()
            if self._stopped:
                self._withdraw()

    def _say_where(self) -> None:
        url = self._server.client.url
        if self._rendezvous is None or self._key is None:
            out.print(f"serving at [bold]{url}[/bold] (a run uses it with engine.urls={escape(f'[{url}]')})")
            return
        from owpo_megatron.engine import Announcement, announce

        url = f"http://{self._host}:{url.rpartition(':')[2]}"
        mirror = f"http://{self._host}:{self._mirror.port}" if self._mirror is not None else None
        told = Announcement(url, self._key, host=socket.gethostname(), pid=os.getpid(), mirror=mirror)
        announce(self._rendezvous, self._index, told)
        where = escape(str(self._rendezvous))
        if self._warm:
            out.print(f"warm at [bold]{url}[/bold]: runs of this configuration on this machine find it")
            return
        out.print(f"serving at [bold]{url}[/bold], announced as engine {self._index} (engine.rendezvous={where})")

    def _withdraw(self) -> None:
        if self._rendezvous is not None:
            from owpo_megatron.engine import withdraw

            withdraw(self._rendezvous, self._index)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True


def _as_in_a_run(settings: Config, model_files: Path) -> tuple[dict[str, Any], dict[str, str], Path]:
    """SGLang's arguments and variables in a run of this configuration, and the folder where the run looks for them.

    Raises:
        UserError: there is such an engine already, or a run of this configuration starts none or several.
    """
    from owpo_megatron.engine.command import server_variables
    from owpo_megatron.engine.warm import warm_folder, warm_process
    from owpo_megatron.sync import run_arguments

    engine = settings.engine
    if not (engine.warm and engine.starts_servers and engine.count == 1):
        remedy = "its runs would not use it: set engine.warm true, engine.count 1, and no urls, router or rendezvous"
        raise UserError("--warm", True, remedy)
    arguments, variables = run_arguments(settings), server_variables(settings)
    folder = warm_folder(settings.runs_dir, engine, model_files, settings.model.dtype, arguments, variables)
    if (process := warm_process(folder)) is not None:
        raise UserError("--warm", True, f"process {process} keeps an engine for this configuration already")
    return arguments, variables, folder


def _mirror(host: str, key: str, copies: Path) -> Mirror:
    """The replica service for runs with sync.delta; it uses no memory until the first one asks."""
    from owpo_megatron.sync.delta.replica import Mirror

    return Mirror(host, key, copies)


def _reachable(host: str) -> str:
    return socket.gethostname() if host == "0.0.0.0" else host


def _announce_failure(folder: Path, index: int, reason: str) -> None:
    from owpo_megatron.engine import announce_failure

    announce_failure(folder, index, reason)


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError("argument", text, "write it as NAME=VALUE, e.g. max_total_tokens=8192")
    return name, yaml.safe_load(value)
