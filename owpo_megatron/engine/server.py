"""An SGLang server owned by the run: started, watched, restarted and stopped with it."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import supervise
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.command import check_environment, command_line, environment, find_python, server_arguments
from owpo_megatron.engine.rendezvous import write_private
from owpo_megatron.errors import EngineError, UserError

PORT_TRIES = 3
# Below the ephemeral range: a start takes seconds, during which an outgoing connection might take the port.
PORTS = range(20000, 32000)
POLL_SECONDS = 0.1
TAIL_LINES = 20
ARGPARSE_STATUS = 2  # exit status of a program that refuses its arguments


class Server:
    """One `sglang.launch_server` process group, logging to a file; it dies with this process, however that exits.

    Args:
        config: the `engine` section.
        model_path: HF checkpoint folder.
        dtype: "float32" or "bfloat16".
        raw: server arguments of the `sglang` section.
        log_path: file that the server's output is appended to.
        key: API key that every request must carry; it is never part of a command line, where any user could read it.
        variables: environment variables of the server, besides this process's.

    Raises:
        UserError: interpreter, SGLang, model or port are unusable; nothing was started.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_path: Path,
        dtype: str,
        raw: Mapping[str, Any],
        log_path: Path,
        key: str | None = None,
        variables: Mapping[str, str] = {},
    ):
        check_environment(config, model_path)
        self._arguments = server_arguments(config, model_path, dtype, raw)
        self._config = config
        self._raw = dict(raw)
        self._variables = dict(variables)
        self._model_path = model_path
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""
        self._log_start = 0
        self.log_path = log_path
        self.client = EngineClient("http://not-started", config.request_timeout, key)
        self.client.shares_memory = True
        self._key_file: Path | None = None
        if key is not None:
            self._key_file = log_path.with_suffix(".key.yaml")  # SGLang requires the ending .yaml
            write_private(self._key_file, f"api-key: {key}\n")
            self._arguments["config"] = str(self._key_file)
        if config.port and not _is_free(config.host, config.port):
            raise UserError("engine.port", config.port, "in use; choose another port, or 0 for a free one")

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            UserError: SGLang refuses an argument of the `sglang` section.
            EngineError: it died or did not answer within `startup_timeout`; the message ends with its last log lines.
        """
        for tries_left in reversed(range(PORT_TRIES)):
            port = self._config.port or _free_port(self._config.host)
            try:
                self._launch(port)
                self._wait_until_ready()
                break
            except EngineError as error:
                self.stop()
                if not re.search(r"(?i)address already in use", self._log()):
                    raise
                if self._config.port or not tries_left:
                    raise EngineError(f"port {port} was taken by another process while SGLang started") from error
            except BaseException:
                self.stop()
                raise
        self.client.freeze_gc()

    def restart(self) -> None:
        """Kill what is left and start again, on a new port; the client follows. Raises as `start` does."""
        self.stop()
        self.start()

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor; None while there is none."""
        return None if self._process is None else self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Kill the process group and wait until it has ended."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def abort(self) -> None:
        """Make the server's main process write the stacks of its threads into the log, and end it."""
        import psutil  # here: `owpo doctor` must start where it is missing

        if self._process is not None:
            for child in psutil.Process(self._process.pid).children():
                child.send_signal(signal.SIGABRT)

    def close(self) -> None:
        self.stop()
        self.client.close()
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def log_tail(self) -> str:
        """Return the last lines of the log, without progress bars."""
        lines = [line.rsplit("\r", 1)[-1].rstrip() for line in self._log().split("\n")]
        return "\n".join([line for line in lines if line][-TAIL_LINES:])

    def _log(self) -> str:
        """Return the output of the current process, or of the last one."""
        with open(self.log_path, "rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def _launch(self, port: int) -> None:
        # the name distinguishes our server from another one that answers on the same port
        self._name = f"owpo-{uuid.uuid4().hex[:12]}"
        arguments = {**self._arguments, "port": port, "served_model_name": self._name}
        command = command_line(find_python(self._config), arguments)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._log_start = log.tell()
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervise.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._config, self._model_path, self._variables),
                start_new_session=True,
            )
        host = "127.0.0.1" if self._config.host == "0.0.0.0" else self._config.host
        self.client.connect(f"http://{host}:{port}")

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._config.startup_timeout
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                self._refuse_arguments(status)
                raise self._failure(f"exited with status {status} before it answered")
            try:
                if self.client.model_info(timeout=5.0).get("served_model_name") == self._name:
                    return
            except EngineError:
                pass  # not listening yet, or another server answers
            time.sleep(POLL_SECONDS)
        raise self._failure(f"did not answer within engine.startup_timeout = {self._config.startup_timeout:g} s")

    def _refuse_arguments(self, status: int) -> None:
        """Raise UserError if SGLang refused its command line, since those arguments are the user's."""
        complaint = re.search(r"error: (.+)$", self.log_tail())
        if status == ARGPARSE_STATUS and complaint:
            raise UserError("sglang", self._raw, f"SGLang refuses its command line: {complaint[1]}")

    def _failure(self, what: str) -> EngineError:
        tail = self.log_tail()
        lines = tail.splitlines()
        reasons = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception|Interrupt)\b", line)] or lines
        why = f": {reasons[-1].strip()}" if reasons else ""
        return EngineError(f"SGLang {what}{why}; the end of {self.log_path}:\n{tail}")


def probe_port(host: str, port: int) -> None:
    """Bind the port and release it. Raises OSError when it cannot be bound, UserError for no address."""
    with socket.socket() as probe:
        try:
            socket.getaddrinfo(host, port)
        except socket.gaierror as error:
            raise UserError("engine.host", host, f"is no address of this machine ({error.strerror})") from error
        # as uvicorn binds: lingering connections of an earlier server do not matter
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _is_free(host: str, port: int) -> bool:
    try:
        probe_port(host, port)
    except OSError:
        return False
    return True


def _free_port(host: str) -> int:
    for port in random.sample(PORTS, 100):
        if _is_free(host, port):
            return port
    raise EngineError(f"no free port found between {PORTS.start} and {PORTS.stop}; set engine.port")
