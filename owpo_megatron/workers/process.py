"""One rollout worker: `python -m owpo_megatron.workers.process HOST PORT INDEX`, the key on standard input.

It ends when global rank 0 closes the connection, or the rank that started it its end of standard input.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

from owpo_megatron.carried import carry
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.errors import EngineError, RunError, one_line
from owpo_megatron.types import GradingItem, Prompt, Rollout, Verifier
from owpo_megatron.workers.joining import join
from owpo_megatron.workers.messages import LEAVE, PING, Answer, Ask, GradingOrder, Ready, Server

LEAVE_SECONDS = 1.0
PARENT_SECONDS = 1.0  # between two looks for the rank that started this process

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
            with carry(pickle.loads(order.carried) if order.carried else {}):
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

    def leave(self) -> None:
        """Report to rank 0 that this process ends, so that it does not count as lost."""
        if self._lock.acquire(timeout=LEAVE_SECONDS):
            with suppress(OSError):
                self._connection.send(LEAVE)

    def close(self) -> None:
        self._graders.shutdown(wait=False, cancel_futures=True)
        if self._verifier is not None:
            self._verifier.close()

    def _begin(self, ask: Ask) -> None:
        post = self._client(ask.server).submit(ask.requests, ask.sampling, ask.version, ask.names)
        # neither the thread that has read the answer nor this one waits for a verdict
        post.add_done_callback(lambda drawn: self._grade(ask, drawn))

    def _grade(self, ask: Ask, drawn: Future[list[Rollout]]) -> None:
        """Callback, whose error nobody would hear of."""
        try:
            self._graders.submit(self._finish, ask, drawn)
        except RuntimeError:  # no more threads: without this process its posts go to another one
            _end_with_trace()

    def _client(self, server: Server) -> EngineClient:
        client = self._clients.get(server.url)
        if client is None or Server.of(client) != server:
            client = self._clients[server.url] = server.client()
        return client

    def _finish(self, ask: Ask, drawn: Future[list[Rollout]]) -> None:
        try:
            answer = Answer(ask.number, self._graded(drawn.result()))
        except EngineError as error:
            answer = Answer(ask.number, error=error)
        except Exception as error:
            answer = _failed(ask, error)
        try:
            self._send(answer)
        except OSError:
            pass  # rank 0 is gone, and this process ends
        except Exception as error:  # it cannot be pickled
            self._send(_failed(ask, error))

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


def _failed(ask: Ask, error: Exception) -> Answer:
    with suppress(OSError):  # onto a full disk
        traceback.print_exception(error)
    return Answer(ask.number, error=RunError(f"a rollout worker failed: {one_line(error)}"))


def main(argv: Sequence[str]) -> int:
    host, port, index = argv
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a job: its workers end with its ranks
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which what a rule starts would have, too
    key = bytes.fromhex(sys.stdin.readline())
    workers: list[RolloutWorker] = []
    threading.Thread(target=_end_with_parent, args=(workers,), daemon=True).start()
    try:
        connection = join((host, int(port)), key, int(index))
        order: GradingOrder | None = connection.recv()
    except (OSError, EOFError, AuthenticationError) as error:
        print(f"rank 0 is not reached at {host}:{port}: {one_line(error)}", flush=True)
        return 1
    try:
        workers.append(RolloutWorker(connection, order))
    except Exception as error:
        connection.send(Ready(one_line(error)))
        raise
    try:
        workers[0].serve()
    except (EOFError, ConnectionError):
        return 0  # rank 0 has ended, or is done
    return 1


def _end_with_parent(workers: Sequence[RolloutWorker]) -> None:
    rank = os.getppid()
    while os.getppid() == rank:  # a fork of it may outlive it, with its end of standard input
        if select.select([sys.stdin], [], [], PARENT_SECONDS)[0]:
            break
    for worker in workers:
        worker.leave()
    os._exit(0)


def _end_with_trace() -> None:
    """End at once: posts in flight are nobody's any more, and rank 0 gives them to another worker."""
    with suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BaseException:
        _end_with_trace()
    os._exit(code)
