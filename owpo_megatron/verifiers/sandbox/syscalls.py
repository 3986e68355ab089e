"""The filter of system calls inside the sandbox, as a seccomp program.

Namespaces take away what a program can reach; the filter takes away what is left of the kernel: memory that no limit
counts (memfd, System V segments), other processes' memory, mounts, new namespaces, and sockets that no network
namespace holds (vsock leads from a virtual machine to its host). Without namespaces it also keeps a program from
starting others, which nothing else could count or find.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
THREAD = 0x10000  # CLONE_THREAD
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
X32 = 0x40000000  # system calls of x86's third ABI have other numbers

# offsets in struct seccomp_data
NUMBER, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # BPF instructions
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*

# The same numbers on every architecture: open_tree, move_mount, fsopen, io_uring_setup, mount_setattr, memfd_secret.
COMMON = (428, 429, 430, 425, 442, 447)


@dataclass(frozen=True)
class Architecture:
    """Numbers of <asm/unistd.h>. `denied` in both rows: ptrace, process_vm_readv, process_vm_writev, unshare, setns,
    mount, umount2, pivot_root, bpf, perf_event_open, userfaultfd, keyctl, add_key, request_key, memfd_create, shmget,
    msgget, semget, open_by_handle_at, kexec_load, init_module, finit_module."""

    audit: int
    forks: tuple[int, ...]
    clone: int
    clone3: int
    socket: int
    denied: tuple[int, ...]


ARCHITECTURES = {
    "x86_64": Architecture(
        0xC000003E, (57, 58), 56, 435, 41,
        (101, 310, 311, 272, 308, 165, 166, 155, 321, 298, 323, 250, 248, 249, 319, 29, 68, 64, 304, 246, 175, 313),
    ),
    "aarch64": Architecture(
        0xC00000B7, (), 220, 435, 198,
        (117, 270, 271, 97, 268, 40, 39, 41, 280, 241, 282, 219, 217, 218, 279, 194, 186, 190, 265, 104, 105, 273),
    ),
}  # fmt: skip


def seccomp_program(machine: str = "", may_fork: bool = True) -> bytes:
    """The filter for this machine as an array of struct sock_filter, empty for an architecture without a table.

    Args:
        may_fork: whether it may start processes; threads it may.
    """
    own = ARCHITECTURES.get(machine or platform.machine())
    if own is None:
        return b""
    refused = FAIL | errno.EPERM
    program = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(EQUAL, own.audit, 1, 0),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(AT_LEAST, X32, 0, 1),
        _instruction(RETURN, refused),
    ]
    for number in (*own.denied, *COMMON, *(() if may_fork else own.forks)):
        program += [_instruction(EQUAL, number, 0, 1), _instruction(RETURN, refused)]
    # Its flags lie in memory, where a filter cannot look; libc falls back to clone.
    program += [_instruction(EQUAL, own.clone3, 0, 1), _instruction(RETURN, FAIL | errno.ENOSYS)]
    allow = 4 + len(FAMILIES)
    program += [
        _instruction(EQUAL, own.clone, 0, 4),
        _instruction(LOAD, ARGUMENT_0),
        _instruction(AND, NEW_NAMESPACES if may_fork else THREAD),
        _instruction(EQUAL, 0, *((allow, 0) if may_fork else (0, allow))),
        _instruction(RETURN, refused),
        _instruction(EQUAL, own.socket, 0, 2 + len(FAMILIES)),
        _instruction(LOAD, ARGUMENT_0),
        *(_instruction(EQUAL, family, len(FAMILIES) - place, 0) for place, family in enumerate(FAMILIES)),
        _instruction(RETURN, FAIL | errno.EAFNOSUPPORT),
        _instruction(RETURN, ALLOW),
    ]
    return b"".join(program)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """A struct sock_filter; the jumps skip so many instructions."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
