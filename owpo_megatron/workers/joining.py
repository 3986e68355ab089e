"""Connects a worker and global rank 0, each of which proves by a key that it is of this run."""

from __future__ import annotations

import os
import socket
import struct
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

CONNECT_SECONDS = 60.0
HANDSHAKE_SECONDS = 30.0  # for a stranger to prove that it is none


def listen(host: str, backlog: int) -> socket.socket:
    """A socket that workers connect to, at this address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


def join(address: tuple[str, int], key: bytes, index: int) -> Connection:
    """Connect to global rank 0 as the worker of this number.

    Raises:
        OSError, EOFError, AuthenticationError: it is not there, or another program is.
    """
    line = socket.create_connection(address, CONNECT_SECONDS)
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(line.detach())
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send(index)
    except BaseException:
        connection.close()
        raise
    return connection


def welcome(line: socket.socket, key: bytes) -> tuple[Connection, int]:
    """The connection to whoever has connected, over a duplicate of the socket, and its number.

    Raises:
        Exception: it is no worker of this run; the connection is closed.
    """
    connection = Connection(os.dup(line.fileno()))
    try:
        limit_silence(line, HANDSHAKE_SECONDS)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        index: int = connection.recv()
        limit_silence(line, 0.0)
    except BaseException:
        connection.close()
        raise
    return connection, index


def limit_silence(line: socket.socket, seconds: float) -> None:
    """Let reading end by BlockingIOError where nothing comes for so long; 0: never."""
    whole = int(seconds)
    line.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
    )
