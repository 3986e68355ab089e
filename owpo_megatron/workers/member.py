"""A rollout worker that global rank 0 is connected to: one thread listens to it, one sends.

Whoever hands it a message does not wait: it is often the thread that listens to another worker.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.errors import one_line
from owpo_megatron.types import Rollout, SampleRequest, Sampling
from owpo_megatron.workers.joining import limit_silence
from owpo_megatron.workers.messages import LEAVE, PING, Answer

PING_SECONDS = 10.0  # without a message before a worker is asked whether it is there
SILENT_SECONDS = 120.0  # without a message before it is taken for lost


@dataclass(frozen=True)
class Post:
    """Arguments of `submit`, and the future of its result."""

    client: EngineClient
    requests: Sequence[SampleRequest]
    sampling: Sampling
    version: int | None
    names: Sequence[str] | None
    result: Future[list[Rollout]]


class Member:
    """A worker that takes posts.

    Args:
        connection: to it, over a duplicate of the socket `line`.
    """

    def __init__(self, index: int, connection: Connection, line: socket.socket):
        self.index = index
        self.posts: dict[int, Post] = {}
        """Under way, by number; the pool's."""
        self._connection, self._line = connection, line
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()  # None: the end
        self._fault = ""  # why nothing can be sent

    @property
    def load(self) -> int:
        """Samples under way."""
        return sum(len(post.requests) for post in self.posts.values())

    def send(self, message: object) -> None:
        """Have a message sent, without waiting."""
        self._outbox.put(message)

    def hang_up(self) -> None:
        """End the connection for both sides, at once: a file that a thread waits for is not closed until it returns."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def listen(self, heard: Callable[[Answer], None]) -> str | None:
        """Pass its answers on until it is gone; returns why it is lost, None where it has taken its leave."""
        sender = threading.Thread(target=self._send_all, name=f"worker-{self.index}-posts", daemon=True)
        try:
            sender.start()
            return self._listen(heard)
        except (EOFError, ConnectionError):
            return self._fault or "its process has ended"
        except BlockingIOError:  # in the middle of a message
            return f"silent for {SILENT_SECONDS:g} s"
        except Exception as error:  # of the network, or no message of a worker's
            return self._fault or one_line(error)
        finally:
            self.hang_up()
            self._outbox.put(None)
            if sender.ident is not None:
                sender.join()
            self._connection.close()  # not before: its number may be another file's by the time of the next write
            self._line.close()

    def _listen(self, heard: Callable[[Answer], None]) -> str | None:
        limit_silence(self._line, SILENT_SECONDS)
        silent = 0.0  # counted, not read off the clock: the whole job may have been suspended
        while True:
            if not self._connection.poll(PING_SECONDS):
                silent += PING_SECONDS
                if silent >= SILENT_SECONDS:
                    return f"silent for {SILENT_SECONDS:g} s"
                self.send(PING)
                continue
            silent = 0.0
            message = self._connection.recv()
            if message == LEAVE:
                return None
            if isinstance(message, Answer):
                heard(message)

    def _send_all(self) -> None:
        for message in iter(self._outbox.get, None):
            try:
                self._connection.send(message)
            except ConnectionError:  # it is gone, which the other thread finds, too
                return
            except Exception as error:  # of the network, or the message cannot be pickled
                self._fault = one_line(error)
                self.hang_up()
                return
