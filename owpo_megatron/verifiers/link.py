"""The pool's end of a socket pair: frames in both directions, without ever blocking."""

from __future__ import annotations

import selectors
import socket
from collections import deque

from owpo_megatron.verifiers.protocol import frame, take_frames

RECEIVE_BYTES = 65536
MAX_DESCRIPTORS = 4  # in one message


class Link:
    """A socket that a selector watches, with itself as the data of its key.

    Args:
        takes_descriptors: open files that the other end sends are kept; elsewhere the kernel closes them.
    """

    def __init__(self, connection: socket.socket, selector: selectors.BaseSelector, takes_descriptors: bool = False):
        connection.setblocking(False)
        self._socket = connection
        self._selector = selector
        self._takes_descriptors = takes_descriptors
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        self.bodies: deque[bytes] = deque()
        """Frames that were received and not yet taken."""
        self.descriptors: deque[int] = deque()
        self.ended = False
        """The other end is closed, or sent what is no frame; nothing can be sent any more."""
        selector.register(connection, selectors.EVENT_READ, self)

    def send(self, body: bytes) -> None:
        """Send a frame; what the socket does not take now goes with the next `exchange`."""
        if self.ended:
            return
        self._outgoing = memoryview(bytes(self._outgoing) + frame(body))
        self._send()

    def exchange(self) -> None:
        """Send what the socket takes, receive what it has."""
        if self.ended:
            return
        self._send()
        try:
            received = self._receive()
            self._incoming += received
            self.bodies.extend(take_frames(self._incoming))
        except BlockingIOError:
            return
        except (ConnectionError, ValueError):
            received = b""
        if not received:
            self.close()

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            self._selector.unregister(self._socket)
            self._socket.close()

    def _receive(self) -> bytes:
        if not self._takes_descriptors:
            return self._socket.recv(RECEIVE_BYTES)
        received, descriptors, _, _ = socket.recv_fds(
            self._socket, RECEIVE_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        self.descriptors.extend(descriptors)
        return received

    def _send(self) -> None:
        waited = bool(self._selector.get_key(self._socket).events & selectors.EVENT_WRITE)
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
        except BlockingIOError:
            pass  # full; the selector reports when there is room
        except ConnectionError:
            self._outgoing = memoryview(b"")  # receiving finds out, after what was sent before
        if waited != bool(self._outgoing):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
            self._selector.modify(self._socket, events, self)
