"""One rollout worker: `python -m owpo_megatron.workers.process HOST PORT INDEX`, the key on standard input.

It ends when global rank 0 closes the connection, or the rank that started it its end of standard input.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Client, Connection

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.errors import EngineError, RunError, one_line
from owpo_megatron.types import GradingItem, Prompt, Rollout, Verifier
from owpo_megatron.workers.messages import PING, Answer, Ask, GradingOrder, Ready, Server

NO_PROMPT = Prompt("", (), "", "")
CUT = "abort"  # finish reason of a response that goes on in another step: not judged yet


class RolloutWorker:
    """Sends posts to engines as they come, and answers each with its rollouts, graded where there is an order.

    Args:
        connection: to global rank 0.
        order: what to grade with; None: rank 0 grades.
    """

    def __init__(self, connection: Connection, order: GradingOrder | None):
        self._connection, self._order = connection, order
        self._clients: dict[str, EngineClient] = {}
        self._lock = threading.Lock()  # of sending
        self._verifier: Verifier | None = None
        self._graders = ThreadPoolExecutor(1 if order is None else max(4, 2 * order.config.workers), "grading")
        if order is not None:
            from owpo_megatron.data import load_tokenizer  # seconds, and not needed without grading
            from owpo_megatron.verifiers import make_verifier

            self._decode = load_tokenizer(order.model_files).decode
            self._verifier = make_verifier(order.config, order.domains, order.rules)

    def serve(self) -> None:
        """Answer until rank 0 closes the connection."""
        self._send(Ready())
        while True:
            message = self._connection.recv()
            if message == PING:
                self._send(PING)
            else:
                self._begin(message)

    def close(self) -> None:
        self._graders.shutdown(wait=False, cancel_futures=True)
        if self._verifier is not None:
            self._verifier.close()

    def _begin(self, ask: Ask) -> None:
        post = self._client(ask.server).submit(ask.requests, ask.sampling, ask.version, ask.names)
        # neither the thread that has read the answer nor this one waits for a verdict
        post.add_done_callback(lambda drawn: self._graders.submit(self._finish, ask, drawn))

    def _client(self, server: Server) -> EngineClient:
        client = self._clients.get(server.url)
        if client is None or Server.of(client) != server:
            client = self._clients[server.url] = server.client()
        return client

    def _finish(self, ask: Ask, drawn: Future[list[Rollout]]) -> None:
        try:
            self._send(Answer(ask.number, self._graded(drawn.result())))
        except EngineError as error:
            self._send(Answer(ask.number, error=error))
        except Exception as error:
            traceback.print_exc()
            self._send(Answer(ask.number, error=RunError(f"a rollout worker failed: {one_line(error)}")))

    def _graded(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with verdicts, where their domain has a rule; without their prompts."""
        graded = list(rollouts)
        if self._order is not None and self._verifier is not None:
            domains = self._order.all_domains
            whole = [
                index for index, one in enumerate(rollouts) if one.finish_reason != CUT and one.prompt.domain in domains
            ]
            items = [GradingItem.of(rollouts[index], self._decode) for index in whole]
            for index, verdict in zip(whole, self._verifier.submit(items).result(), strict=True):
                graded[index] = replace(graded[index], verdict=verdict)
        return [replace(one, prompt=NO_PROMPT) for one in graded]

    def _send(self, message: object) -> None:
        with self._lock:
            self._connection.send(message)


def main(argv: Sequence[str]) -> int:
    host, port, index = argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when its workers end
    key = bytes.fromhex(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection = Client((host, int(port)), authkey=key)
        connection.send(int(index))
        order: GradingOrder | None = connection.recv()
        try:
            worker = RolloutWorker(connection, order)
        except Exception as error:
            connection.send(Ready(one_line(error)))
            raise
        worker.serve()
    except (EOFError, ConnectionError):
        return 0  # rank 0 has ended, or is done
    return 1


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # posts in flight are nobody's any more
