"""The sandbox against programs that hang, multiply, eat, write, spy, flee and lie. The real kernel decides.

Not covered: other architectures than this machine's, kernels without namespaces (the message for them is), and escapes
through faults of the kernel itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from owpo_megatron.errors import UserError
from owpo_megatron.verifiers import sandbox
from owpo_megatron.verifiers.sandbox import PYTHON, Limits, isolation, run
from owpo_megatron.verifiers.sandbox.syscalls import ARCHITECTURES, COMMON, seccomp_program

pytestmark = pytest.mark.process
needs_namespaces = pytest.mark.skipif("sandbox.why_refused() is not None", reason="this machine refuses namespaces")
BOTH = pytest.mark.parametrize("kind", [pytest.param("namespaces", marks=needs_namespaces), "process"])

MIB = 2**20
GRACE = 3.0  # seconds that a busy machine may take beyond a limit
BOMB = """
import os, time
for _ in range(7):
    try:
        os.fork()
    except OSError:
        pass
time.sleep(60)
"""
COUNT = """
import os, time
started = 0
for _ in range(20):
    try:
        if not os.fork():
            time.sleep(60)
        started += 1
    except OSError:
        pass
print(started)
"""


def program(text: str, kind: str = "namespaces", stdin: bytes = b"", **limits):
    return run([PYTHON, "-I", "-S", "-c", text], stdin=stdin, limits=Limits(**limits), isolation=kind)


def carrying(mark: str) -> list[int]:
    """Processes whose command line holds this mark, anywhere on the machine; zombies do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(mark in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@BOTH
def test_input_output_and_status(kind):
    outcome = program("import sys; print(input()[::-1]); print('no', file=sys.stderr); sys.exit(3)", kind, b"abc")
    assert (outcome.reason, outcome.code) == ("exit", 3) and not outcome.ok
    assert outcome.stdout == b"cba\n" and outcome.stderr == b"no\n"
    assert 0 < outcome.cpu_seconds < 5 and 0 < outcome.seconds
    assert program("pass", kind).ok


@BOTH
def test_files_are_there_and_the_folder_is_gone_afterwards(kind):
    text = "import os; print(open('data/in.txt', 'rb').read(), os.getcwd()); open('out', 'w').write('x')"
    files = {"main.py": text, "data/in.txt": b"\xff\x00ok"}
    outcome = run([PYTHON, "-I", "main.py"], files, isolation=kind)
    content, folder = outcome.stdout.decode().rsplit(" ", 1)
    assert content == repr(b"\xff\x00ok")
    assert not Path(folder.strip()).exists()


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_a_file_name_that_leads_out_is_refused(name):
    with pytest.raises(ValueError, match="no path inside"):
        run(["true"], {name: b""})


@BOTH
@pytest.mark.parametrize("text", ["while True: pass", "import time; time.sleep(60)", "import sys; sys.stdin.read(); 1"])
def test_a_hang_ends_at_its_limit(kind, text):
    if "stdin" in text:  # its input has an end: no hang at all
        assert program(text, kind).ok
        return
    outcome = program(text, kind, seconds=0.5)
    assert outcome.reason == "timeout" and outcome.code is None
    assert 0.5 <= outcome.seconds < 0.5 + GRACE


@BOTH
def test_cpu_time_has_a_limit_of_its_own(kind):
    outcome = program("while True: pass", kind, seconds=30, cpu_seconds=0.3)
    assert outcome.reason == "timeout" and 0.3 < outcome.seconds < 20


@BOTH
def test_signals_that_it_ignores_or_sends_help_it_nothing(kind):
    text = (
        "import os, signal, time\n"
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(60)"
    )
    assert program(text, kind, seconds=0.3).reason == "timeout"
    outcome = program("import os; os.kill(os.getpid(), 9)", kind)
    assert (outcome.reason, outcome.code) == ("signal", signal.SIGKILL)
    assert program("import ctypes; ctypes.string_at(0)", kind).code == signal.SIGSEGV


@BOTH
def test_a_fork_bomb(kind):
    """Seven generations would be 128 processes: the kernel stops it at the limit, and none survives."""
    mark = f"bomb-{os.urandom(8).hex()}"
    outcome = []
    run_it = threading.Thread(
        target=lambda: outcome.append(program(BOMB + f"# {mark}", kind, seconds=1.5, processes=12))
    )
    run_it.start()
    most = 0
    while run_it.is_alive():
        most = max(most, len(carrying(mark)))
    assert outcome[0].reason == "timeout"
    assert 1 <= most <= (12 if kind == "namespaces" else 1)
    assert not carrying(mark)


@needs_namespaces
def test_a_child_in_a_session_of_its_own_ends_with_it():
    """A daemon: forked twice, setsid, its own process group, all descriptors closed, signals ignored."""
    mark = f"daemon-{os.urandom(8).hex()}"
    text = (
        "import os, subprocess, sys, time\n"
        "code = 'import os, signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; os.setsid();"
        f" os.closerange(0, 99); os.fork() and os._exit(0); time.sleep(99) # {mark}'\n"
        "print(subprocess.Popen([sys.executable, '-I', '-S', '-c', code], start_new_session=True).wait())"
    )
    outcome = program(text)
    assert outcome.ok and outcome.stdout, outcome
    assert not carrying(mark)


def test_by_process_isolation_there_are_threads_but_no_children():
    text = (
        "import os, subprocess, sys, threading\n"
        "thread = threading.Thread(target=print, args=['a thread'], kwargs={'flush': True})\n"
        "thread.start(); thread.join()\n"
        "for start in (os.fork, lambda: subprocess.run(['true']), lambda: os.posix_spawn('/bin/true', ['true'], {})):\n"
        "  try: start(); print('STARTED')\n"
        "  except PermissionError: print('refused')"
    )
    assert program(text, "process").stdout.split(b"\n")[:-1] == [b"a thread"] + [b"refused"] * 3


@BOTH
def test_output_without_end(kind):
    outcome = program("import sys\nwhile True: sys.stdout.write('x' * 10000)", kind, output_bytes=50_000)
    assert outcome.reason == "output" and outcome.stdout == b"x" * 50_000
    outcome = program("import os\nwhile True: os.write(2, b'y' * 10000)", kind, output_bytes=50_000)
    assert outcome.reason == "output" and outcome.stderr == b"y" * 50_000


@BOTH
def test_output_in_the_wrong_encoding_is_bytes(kind):
    outcome = program("import os; os.write(1, bytes(range(256)))", kind)
    assert outcome.stdout == bytes(range(256))


@BOTH
def test_a_memory_bomb_in_one_process(kind):
    outcome = program("blocks = []\nwhile True: blocks.append(bytearray(2**24))", kind, memory_bytes=128 * MIB)
    assert outcome.reason == "exit" and b"MemoryError" in outcome.stderr


@needs_namespaces
def test_a_memory_bomb_in_many_processes():
    """Each is below the limit of one; together they are above."""
    text = (
        "import os, time\n"
        "for _ in range(6):\n if not os.fork():\n  block = bytearray(80 * 2**20); time.sleep(60)\n"
        "time.sleep(60)"
    )
    outcome = program(text, memory_bytes=256 * MIB, seconds=20)
    assert outcome.reason == "memory" and outcome.seconds < 10


@BOTH
def test_a_file_without_end(kind):
    outcome = program("f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))", kind, file_bytes=4 * MIB)
    assert outcome.code != 0 and outcome.reason in ("exit", "signal")


@needs_namespaces
def test_many_files_share_one_limit():
    text = "for n in range(9): open(f'x{n}', 'wb').write(bytes(2**20))"
    assert program(text, file_bytes=12 * MIB).ok
    outcome = program(text, file_bytes=4 * MIB)
    assert b"No space left" in outcome.stderr
    assert b"No space left" in program("for n in range(10**5): open(f'x{n}', 'w').close()").stderr


@needs_namespaces
def test_secrets_are_out_of_reach(tmp_path, monkeypatch):
    """Files of the user, the environment, the command line and memory of the parent: nothing of it is there."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    monkeypatch.setenv("A_KEY", "s3cret")
    text = (
        "import os, sys\n"
        f"for path in ({str(secret)!r}, '/etc/passwd', '/etc/shadow', {str(Path.home())!r} + '/.ssh', "
        f"'/proc/1/environ', '/proc/{os.getpid()}/environ', '/sys', '/run', '/var', '/dev/mem'):\n"
        "  try: print('SEEN', path, os.listdir(path) if os.path.isdir(path) else open(path).read())\n"
        "  except OSError: pass\n"
        "print(sorted(os.environ))"
    )
    outcome = program(text)
    assert outcome.ok and b"SEEN" not in outcome.stdout and b"s3cret" not in outcome.stdout
    assert b"A_KEY" not in outcome.stdout
    assert os.listdir(f"/proc/{os.getpid()}/fd"), "the probe itself works where it should"


@needs_namespaces
def test_the_system_is_read_only():
    text = (
        "import os, sys\n"
        "for path in ('/usr/x', os.path.join(sys.base_prefix, 'x'), '/lib/x', os.path.dirname(os.__file__) + '/x'):\n"
        "  try: open(path, 'w'); print('WROTE', path)\n"
        "  except OSError as error: print(error.errno)\n"
        "open('/tmp/x', 'w'); open('mine', 'w'); print('done')"
    )
    outcome = program(text)
    assert b"WROTE" not in outcome.stdout and outcome.stdout.endswith(b"done\n")


@needs_namespaces
def test_there_is_no_network():
    """Neither the loopback of the machine, nor abstract sockets, nor a socket file, nor other families."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        name = f"\0owpo-{os.urandom(6).hex()}"
        abstract.bind(name)
        abstract.listen()
        text = (
            "import socket\n"
            f"for family, address in ((2, ('127.0.0.1', {tcp.getsockname()[1]})), (1, {name!r}), (2, ('8.8.8.8', 53)),"
            " (40, (2, 1))):\n"
            "  try:\n"
            "    s = socket.socket(family); s.settimeout(2); s.connect(address); print('CONNECTED', address)\n"
            "  except OSError as error: print(error.errno)\n"
        )
        outcome = program(text)
        socket.create_connection(tcp.getsockname()).close()  # it would be there
    assert outcome.ok and b"CONNECTED" not in outcome.stdout and len(outcome.stdout.split()) == 4


@needs_namespaces
def test_no_process_of_the_machine_can_be_signalled():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    text = (
        "import os, signal\n"
        f"for pid in (os.getppid(), {bystander.pid}, {os.getpid()}, 1):\n"
        "  try: os.kill(pid, 9); print('SENT', pid)\n"
        "  except OSError: print('refused', pid)\n"
        "os.kill(-1, 9)"
    )
    outcome = program(text)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert b"SENT %d" % bystander.pid not in outcome.stdout and b"SENT %d" % os.getpid() not in outcome.stdout
    assert outcome.reason in ("exit", "signal")


@needs_namespaces
@pytest.mark.parametrize(
    "call",
    ["unshare(0x10000000)", "unshare(0x20000)", "memfd_create(b'x', 0)", "ptrace(0, 0, 0, 0)", "shmget(0, 4096, 512)"],
)
def test_the_kernel_offers_little(call):
    text = f"import ctypes; print(ctypes.CDLL(None, use_errno=True).{call}, ctypes.get_errno())"
    assert program(text).stdout.split() == [b"-1", b"1"]


@needs_namespaces
def test_it_cannot_write_the_verdict_itself():
    """Tries every descriptor that it could have: its end is what the kernel saw."""
    text = (
        "import os, sys\n"
        'line = b\'{"code": 0, "seconds": 0, "cpu_seconds": 0}\\n\'\n'
        "for fd in range(3, 64):\n"
        "  try: os.write(fd, line); print('WROTE', fd)\n"
        "  except OSError: pass\n"
        "sys.exit(9)"
    )
    outcome = program(text)
    assert outcome.code == 9 and outcome.stdout == b""


@BOTH
def test_no_program_no_jail_no_traceback(kind):
    outcome = run(["/nowhere/program"], isolation=kind)
    assert outcome.reason == "refused" and "No such file" in outcome.detail


@BOTH
def test_everything_ends_when_the_caller_is_killed(kind, tmp_path):
    mark = f"orphan-{os.urandom(8).hex()}"
    script = tmp_path / "caller.py"
    script.write_text(
        "from owpo_megatron.verifiers.sandbox import PYTHON, Limits, run\n"
        f"run([PYTHON, '-I', '-S', '-c', 'import time; time.sleep(99) # {mark}'], limits=Limits(seconds=99),"
        f" isolation={kind!r})\n"
    )
    root = Path(__file__).parents[2]
    caller = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(root)})
    _wait(lambda: carrying(mark))
    caller.kill()
    caller.wait()
    _wait(lambda: not carrying(mark))


@BOTH
def test_several_at_once(kind):
    """Threads of one process: nobody gets another's output, and nobody waits for another's descriptors."""
    outcomes: dict[int, bytes] = {}

    def one(number: int) -> None:
        outcomes[number] = program(f"import time; time.sleep(0.2); print({number})", kind).stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {number: b"%d\n" % number for number in range(4)}


def test_nothing_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for kind in ("namespaces", "process"):
        program("pass", kind)
        program("while True: pass", kind, seconds=0.1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_namespaces_are_refused_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(isolation, "why_refused", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError, match="verifier.sandbox = namespaces.*unshare: Operation not permitted.*process"):
        sandbox.require("namespaces")
    sandbox.require("process")


@needs_namespaces
@pytest.mark.skipif("os.geteuid() != 0", reason="the tests already run as an ordinary user")
def test_an_ordinary_user_gets_the_same(tmp_path):
    """Root takes another way into the namespaces than everybody else; this is the other one."""
    script = tmp_path / "user.py"
    script.write_text(
        "import os\n"
        "from owpo_megatron.verifiers.sandbox import PYTHON, Limits, run\n"
        'spy = \'import os; print(os.getuid(), os.path.exists("/etc/passwd"), os.path.exists("/proc"))\'\n'
        "print(run([PYTHON, '-I', '-S', '-c', spy]).stdout.decode().strip())\n"
        f"outcome = run([PYTHON, '-I', '-S', '-c', {COUNT!r}], limits=Limits(processes=8))\n"
        "print(outcome.stdout.decode())\n"
    )
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", script.read_text()]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = {"user": 65534, "group": 65534, "extra_groups": [], "env": environment, "cwd": "/"}
    try:
        subprocess.run([sys.executable, "-c", "import owpo_megatron"], **options, check=True, capture_output=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("other users cannot read this checkout or its interpreter")
    done = subprocess.run(command, **options, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["1000 False False", "7"], done


@pytest.mark.parametrize("may_fork", [True, False])
def test_the_filter_is_well_formed(may_fork):
    """Every jump lands inside the program, on both architectures; an unknown one has none."""
    for machine, own in ARCHITECTURES.items():
        code = seccomp_program(machine, may_fork)
        count = len(code) // 8
        assert count >= 6 + 2 * (len(own.denied) + len(COMMON)) + 2 + 12 and len(own.denied) == 22
        for place in range(count):
            opcode, if_true, if_false = code[8 * place], code[8 * place + 2], code[8 * place + 3]
            if opcode & 7 == 5:  # a jump
                assert place + 1 + max(if_true, if_false) < count
    assert seccomp_program("riscv64") == b""


def _wait(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
