"""Rules that misbehave as the response demands; imported by the pool's workers by name."""

from __future__ import annotations

import os
import signal
import sys
import time


def obey(item):
    """`ok`, or what the response orders."""
    match item.response.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["hang"]:  # in C code that holds the interpreter's lock: no signal handler of Python would run
            pow(7, 10**10, 3 ** (2 * 10**7))
        case ["raise"]:
            raise RecursionError("deep")
        case ["exit"]:
            sys.exit(0)
        case ["die"]:
            os._exit(7)
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["eat"]:
            blocks = []
            while True:
                blocks.append(bytes(2**28))
        case ["eat-in-one"]:
            sys.stdout.write(str(len("x" * 2**40)))
        case ["print"]:
            print("noise " * 100_000)
        case ["pid"]:
            return str(os.getpid())
        case ["wrong"]:
            return "wrong"
    return "ok"


def unimportable(item):
    return "ok"


def same_length(response, answer):
    """A user's rule: True, False, an error, or something that is no verdict."""
    if response == "boom":
        raise KeyError("boom")
    return 7 if response == "odd" else len(response) == len(answer)
