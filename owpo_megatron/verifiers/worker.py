"""The worker process of the pool: runs the rules, one item at a time, until its socket ends.

It is forked from its guard (verifiers/guard.py), which has imported the rules, and talks with the pool. Its descriptors
are its own: stdin and stdout lead nowhere, the guard keeps the end of what it writes to stderr.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from owpo_megatron.verifiers.protocol import plain, read_frame, told
from owpo_megatron.verifiers.sandbox.jail import PR_SET_PDEATHSIG, prctl

OUT_OF_MEMORY = 3  # exit status


def serve(connection: socket.socket, stderr: int, rules: Mapping[str, Any], memory_bytes: int) -> None:
    """Grade until the socket ends; in a fresh child of the guard."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, target in ((nowhere, 0), (nowhere, 1), (stderr, 2)):
        os.dup2(descriptor, target)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = os.getpid()
    stream = connection.makefile("rb")
    while (body := read_frame(stream)) is not None:
        number, nonce, item = pickle.loads(body)
        detail = ""
        try:
            found = rules[item.domain](item)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # what is left of this process cannot be trusted with the next item
        except Exception as error:  # a rule may raise anything; the verdict records it
            detail = f"{type(error).__name__}: {error}"[:500]
            print(f"verifier rule for {item.domain!r} raised {detail}", file=sys.stderr, flush=True)
            found = "crashed"
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)  # a rule's own time limit that it forgot would end the next item
        if os.getpid() != own:
            os._exit(0)  # the rule forked, and its child came back, too
        connection.sendall(told(number=number, nonce=nonce, verdict=plain(found), detail=detail))
