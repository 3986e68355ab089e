"""Errors that a user can fix, each in one line: the field, its value and the remedy."""

import errno
import os

LONGEST_VALUE = 400  # characters of a value that a message shows


class UserError(ValueError):
    """A mistake in a config, a file or the environment; the command line prints it and exits with code 2.

    Args:
        field: dotted config field, file name (with line) or command-line option at fault.
        value: the value found there.
        remedy: how to fix it, as an instruction.

    Example:
        >>> str(UserError("parallel.tp", 3, "use a divisor of the model's 4 attention heads: 1, 2 or 4"))
        "parallel.tp = 3: use a divisor of the model's 4 attention heads: 1, 2 or 4"
    """

    def __init__(self, field: str, value: object, remedy: str):
        super().__init__(f"{printable(field)} = {printable(_shortened(str(value)))}: {printable(remedy)}")
        self.field = field
        self.value = value
        self.remedy = remedy


def printable(text: str) -> str:
    r"""The text in one line, with escapes for what cannot be printed.

    Example:
        >>> printable("a\nb")
        'a\\nb'
    """
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _shortened(text: str) -> str:
    """The text without its middle, if it is long."""
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} ... {text[-half:]}"


class EngineError(RuntimeError):
    """A rollout engine did not start, died, or refused a request; the message carries its last log lines."""


class RunError(RuntimeError):
    """A run whose ranks failed; the message has the first reason and the log with more."""


class CallbackError(RuntimeError):
    """A callback that raised: the run was stopped and saved. The cause is the callback's own error."""


class ProofError(RuntimeError):
    """A conversion whose two sides are not the same model; the message names the first differences."""


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# What the system allows this process no more of, and the remedy.
LIMITS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files; end what uses them",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or end some",
    errno.ENOMEM: "free memory, or raise the limit of it (ulimit -v)",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}
_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")  # torch's words on CPUs and GPUs
_NO_THREADS = "can't start new thread"  # Python's words


def one_line(error: BaseException) -> str:
    """The first line of an error: errors of this module as they are, others with the name of their type.

    What the system refuses is named by its file. A disk that is full, read-only or broken is no mistake of the
    program's, and neither is a limit of the machine.

    Example:
        >>> one_line(EngineError("engine 0 is gone")), one_line(KeyError("x"))
        ('engine 0 is gone', "KeyError: 'x'")
        >>> one_line(OSError(errno.EMFILE, "Too many open files"))
        'Too many open files: raise the limit of open files (ulimit -n)'
    """
    reason = (str(error).splitlines() or [""])[0]
    if reason and isinstance(error, (UserError, EngineError, RunError, CallbackError, ProofError)):
        return reason
    if isinstance(error, OSError) and error.errno in LIMITS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: {LIMITS[error.errno]}"
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or "a file of the run"
        return f"{where} could not be written: {error.strerror}; start the same command again once it can be"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError) or any(sign in reason for sign in _NO_MEMORY):
        return f"out of memory{': ' if reason else ''}{reason}; lower optimizer.tokens_per_microbatch, or free memory"
    if _NO_THREADS in reason:
        return f"{reason}: {LIMITS[errno.EAGAIN]}"
    for number, remedy in LIMITS.items():  # in the text of an error of C++, as gloo's
        if os.strerror(number) in reason:
            return f"{os.strerror(number)}: {remedy}"
    return f"{type(error).__name__}: {reason}"
