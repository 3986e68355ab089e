"""The worker process of the pool: `python -m owpo_megatron.verifiers.worker FD`, one item at a time.

The first frame holds the rules; the worker sends READY when they are imported, then a rule's result per item. It
exits at the end of the stream.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys

from owpo_megatron.verifiers.protocol import READY, frame, read_frame

OUT_OF_MEMORY = 3  # exit status


def serve(connection: socket.socket) -> None:
    stream = connection.makefile("rb")
    rules, kill_after, memory_bytes = read_frame(stream)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for rule in rules.values():
        if hasattr(rule, "warm"):
            rule.warm()
    connection.sendall(frame(READY))
    while (item := read_frame(stream)) is not None:
        # If the parent dies while a rule hangs, the kernel's timer kills this process, whichever Python or C code is
        # running, because SIGALRM keeps its default action.
        signal.setitimer(signal.ITIMER_REAL, kill_after)
        detail = ""
        try:
            found = rules[item.domain](item)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # what is left of this process cannot be trusted with the next item
        except Exception as error:  # a rule may raise anything; the verdict records it
            detail = f"{type(error).__name__}: {error}"[:500]
            print(f"verifier rule for {item.domain!r} raised {detail}", file=sys.stderr, flush=True)
            found = "crashed"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(frame((found, detail)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it closes the socket
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
