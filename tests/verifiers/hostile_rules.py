"""Rules that misbehave as the response demands; imported by the pool's workers by name."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
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
        case ["alarm", seconds]:  # a time limit of its own, which it forgets
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
        case ["print"]:
            print("noise " * 100_000)
        case ["spin"]:
            while True:
                pass
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["complain"]:
            sys.stderr.write("noise\n" * 1000 + "last words")
            sys.stderr.flush()
            ctypes.string_at(0)
        case ["fork"]:
            os.fork()
        case [("child" | "daemon" | "fork-and-stay" | "thread-of-children") as how, file, *then]:
            _start_children(how, file)
            if then == ["hang"]:
                time.sleep(60)
            if then == ["die"]:
                os._exit(1)
        case ["usurp"]:
            _answer_for_all()
        case ["thief"]:
            _take_items()
        case ["babble"]:
            _socket().sendall(b"\0\0\0\5no{}}")
        case ["oversize"]:
            _socket().sendall(b"\xff" * 8)
        case ["close"]:
            os.closerange(0, 64)
        case ["wrong"]:
            return "wrong"
    return "ok"


def _start_children(how, file):
    """Processes that would live for a minute; their numbers are in the file."""
    if how == "fork-and-stay":
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        pids = [pid]
    elif how == "thread-of-children":
        started = []
        thread = threading.Thread(target=lambda: started.extend(subprocess.Popen(["sleep", "60"]) for _ in range(3)))
        thread.start()
        thread.join()
        pids = [one.pid for one in started]
    elif how == "daemon":  # forked twice, in a session of its own, with no descriptor of ours
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            if pid == 0:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                os.closerange(0, 64)
                time.sleep(60)
            os.write(writer, b"%d" % pid)
            os._exit(0)
        pids = [int(os.read(reader, 20))]
        os.wait()
    else:
        pids = [subprocess.Popen(["sleep", "60"]).pid]
    with open(file, "w") as out:
        out.write(" ".join(map(str, pids)))


def _frame_of_worker():
    """The stack frame of the worker's loop, where its socket, the item's number and its nonce lie."""
    frame = sys._getframe()
    while frame.f_code.co_name != "serve":
        frame = frame.f_back
    return frame.f_locals


def _socket():
    return _frame_of_worker()["connection"]


def _answer_for_all():
    """Leave a process that replies `ok` for this item's number and the next ones, again and again."""
    known = _frame_of_worker()
    number, nonce, connection = known["number"], known["nonce"], known["connection"]
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            for _ in range(200):
                for guess in range(number, number + 8):
                    body = json.dumps({"number": guess, "nonce": nonce, "verdict": "ok", "detail": ""}).encode()
                    try:
                        connection.sendall(len(body).to_bytes(4, "big") + body)
                    except OSError:
                        os._exit(0)
                time.sleep(0.001)
        os._exit(0)
    os.wait()
    time.sleep(0.01)


def _take_items():
    """Leave a process that reads what the pool sends to the worker, and answers `ok` with what it finds there."""
    connection = _socket()
    if os.fork() == 0:
        body = json.dumps({"number": 0, "nonce": "", "verdict": "wrong", "detail": ""}).encode()
        connection.sendall(len(body).to_bytes(4, "big") + body)  # as if the rule had returned
        while True:
            length = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
            number, nonce, _ = pickle.loads(connection.recv(length, socket.MSG_WAITALL))
            body = json.dumps({"number": number, "nonce": nonce, "verdict": "ok", "detail": ""}).encode()
            connection.sendall(len(body).to_bytes(4, "big") + body)
    time.sleep(0.2)


def unimportable(item):
    return "ok"


def same_length(response, answer):
    """A user's rule: True, False, an error, or something that is no verdict."""
    if response == "boom":
        raise KeyError("boom")
    return "seven" if response == "odd" else len(response) == len(answer)
