"""The process around an untrusted program: `python -E -s -S jail.py ORDER REPORT LIFELINE`, three descriptors.

                 run() ------- order, lifeline, stdout, stderr ------> jail ---> init ---> program
                   ^------------------- report, as JSON ----------------------------'

By namespaces, `init` is process 1 of a process namespace: whatever the program starts, also in a session of its own,
ends with it. It sees read-only copies of the interpreter and the libraries, an empty writable folder, no network, no
/proc, and none of the machine's processes. By process, jail and init are one: the limits hold, and the program may
start no others, but it sees the files, the network and the processes of the user who started it.

When the lifeline ends, because `run` closed it or its process died, so does everything here. Only the standard library
is imported, so that this starts in 20 ms; nothing here may print.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any

NEW_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # NS CGROUP UTS IPC PID NET
NEW_USER = 0x10000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 2, 4
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR = 442  # Linux 5.12
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

DEVICES = ("null", "zero", "full", "random", "urandom")
INSIDE_ID = 1000  # of the user in a namespace of its own
FIRST_ID = 1_000_000_000  # of the users, one for each run, that root becomes
BOX = "/box"

libc = ctypes.CDLL(None, use_errno=True)


def checked(name: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    checked("unshare", libc.unshare(ctypes.c_int(flags)))


def prctl(option: int, *arguments: Any) -> None:
    checked("prctl", libc.prctl(option, *(arguments + (0, 0, 0, 0))[:4]))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    checked(f"mount {target}", libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def read_only(path: str) -> None:
    """Make a mount and all below it read-only, without devices or set-user-id programs."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    call = ctypes.c_long(SYS_MOUNT_SETATTR)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    checked(
        f"mount_setattr {path}",
        libc.syscall(call, AT_FDCWD, os.fsencode(path), ctypes.c_uint(AT_RECURSIVE), attributes, size),
    )


class Jail:
    """One run.

    Args:
        order: argv, env, files, folders (path inside -> path outside), links, limits, filter, and
            `root`: the new root, an empty folder, or the program's folder when it is not isolated by namespaces.
    """

    def __init__(self, order: dict[str, Any], report: int, lifeline: int):
        self.order, self.report, self.lifeline = order, report, lifeline
        self.isolated = order["isolation"] == "namespaces"
        self.user: int | None = None  # that the program runs as, if not the own one

    def enter(self) -> None:
        """Namespaces for what is forked from here on. Root becomes another user, so that it owns nothing."""
        if _is_root_of_the_machine():
            with contextlib.suppress(PermissionError):  # a container's root may lack the capability
                unshare(NEW_NAMESPACES)
                self.user = FIRST_ID + os.getpid()
                return
        user, group = os.geteuid(), os.getegid()
        unshare(NEW_USER | NEW_NAMESPACES)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{INSIDE_ID} {user} 1")
        _write("/proc/self/gid_map", f"{INSIDE_ID} {group} 1")

    def build_root(self) -> None:
        """A new root of memory, with nothing in it but what the order names; then forget the old one."""
        root, limits = self.order["root"], self.order["limits"]
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        size = f"size={limits['file_bytes'] + 2**20},nr_inodes=10000,mode=0755"
        mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, size)
        for inside, source in self.order["folders"].items():
            target = root + inside
            os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), exist_ok=True)
            if not os.path.isdir(source):
                _write(target, "")
            mount(source, target, None, MS_BIND | MS_REC)
            read_only(target)
        for name, target in self.order["links"].items():
            os.symlink(target, root + name)
        os.mkdir(root + "/dev")
        for name in DEVICES:
            with open(f"{root}/dev/{name}", "w"):
                mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
        for name in ("/tmp", BOX):
            os.makedirs(root + name, exist_ok=True)  # an interpreter below /tmp has made it
            if self.user is not None:
                os.chown(root + name, self.user, self.user)
        self._write_files(root + BOX)
        os.chdir(root)
        checked("pivot_root", libc.syscall(ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine]), b".", b"."))
        checked("umount2", libc.umount2(b".", MNT_DETACH))
        os.chdir(BOX)

    def enter_folder(self) -> None:
        self._write_files(self.order["root"])
        os.chdir(self.order["root"])
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans, where there is no filter, come to this process

    def _write_files(self, folder: str) -> None:
        for name, text in self.order["files"].items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(text.encode("latin-1"))
            if self.user is not None:
                os.chown(path, self.user, self.user)

    def program(self) -> None:
        """Give up what is left of privileges, set the limits, become the program; never returns."""
        limits = self.order["limits"]
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so
            signal.signal(number, signal.SIG_DFL)
        if self.user is not None:
            os.setgroups(())
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        for kind, value in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _lower(kind, value)
        if limits["cpu_seconds"] is not None:  # `run` measures it more finely; this holds where it cannot look
            _lower(resource.RLIMIT_CPU, math.ceil(limits["cpu_seconds"]) + 1)
        if self.isolated:  # elsewhere all processes of the user count; in a namespace of the user's, the jail's two do
            _lower(resource.RLIMIT_NPROC, limits["processes"] + (2 if self.user is None else 0))
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        code = bytes.fromhex(self.order["filter"])
        if code:
            prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_Filter(len(code) // 8, code)))
        os.execvpe(self.order["argv"][0], self.order["argv"], self.order["env"])

    def supervise(self) -> None:
        """Run the program to its end or to that of the lifeline, and report."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        why_not, trouble = os.pipe()  # exec closes it; what is written is why there was none
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                signal.set_wakeup_fd(-1)
                self.program()
            except Exception as error:
                os.write(trouble, str(error).encode())
            os._exit(127)
        os.close(trouble)
        if reason := os.read(why_not, 1000):
            tell(self.report, refused=reason.decode(errors="replace"))
            return
        tell(self.report, started=True)
        status = None
        while status is None:
            ready, _, _ = select.select((self.lifeline, woken), (), ())
            if self.lifeline in ready:
                return
            os.read(woken, 4096)
            status = reap(child)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        tell(
            self.report,
            code=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - started,
            cpu_seconds=used.ru_utime + used.ru_stime,
            peak_bytes=used.ru_maxrss * 1024,
        )

    def end(self) -> None:
        """Kill every descendant. By namespaces the end of this process does so."""
        if self.isolated:
            return
        try:
            while True:
                for pid in descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.001)
        except ChildProcessError:
            return  # none is left: orphans had come to this process


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def reap(child: int) -> int | None:
    """Collect whatever ended; return the wait status of `child` if it did."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                found = ended[1]
    return found


def descendants(pid: int) -> list[int]:
    """Processes below this one, as far as /proc shows them; empty when it has ended."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(child) for child in file.read().split()]
    except OSError:
        return []
    return found + [below for child in found for below in descendants(child)]


def tell(report: int, **values: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        os.write(report, json.dumps(values).encode() + b"\n")


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _is_root_of_the_machine() -> bool:
    with open("/proc/self/uid_map") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", str(2**32 - 1)]


def main() -> None:
    order_fd, report, lifeline = map(int, sys.argv[1:])
    for descriptor in (order_fd, report, lifeline):
        os.set_inheritable(descriptor, False)
    with open(order_fd, "rb") as file:
        jail = Jail(json.load(file), report, lifeline)
    try:
        _write("/proc/self/oom_score_adj", "1000")  # the first to go when the machine runs out of memory
        if jail.isolated:
            jail.enter()
            init = os.fork()
            if init:
                os.waitpid(init, 0)
                os._exit(0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            prctl(PR_SET_DUMPABLE, 0)  # the program cannot open this process's descriptors
            jail.build_root()
        else:
            jail.enter_folder()
        jail.supervise()
    except OSError as error:
        tell(report, refused=str(error))
    finally:
        jail.end()
        os._exit(0)


if __name__ == "__main__":
    main()
