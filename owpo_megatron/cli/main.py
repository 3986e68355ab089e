"""The `owpo` command. Exit codes: 0 done, 1 failure, 2 user mistake. Imports no torch."""

from __future__ import annotations

import atexit
import codecs
import gc
import locale
import os
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape

from owpo_megatron import __version__
from owpo_megatron.cli.options import err, out
from owpo_megatron.errors import LIMITS, EngineError, ProofError, UserError, one_line, printable

# command -> its home in this folder, in the order of `owpo --help`
_HOMES = {
    "quickstart": "quickstart.quickstart",
    "train": "train.train",
    "eval": "evaluate.evaluate",
    "verify": "verify.verify",
    "compare": "compare.compare",
    "plan": "plan.plan",
    "methods": "methods.methods",
    "protocol": "protocol.protocol",
    "reproduce": "reproduce.reproduce",
    "report": "report.report",
    "samples": "samples.samples",
    "replay": "replay.replay",
    "runs": "runs.runs",
    "coverage": "support.coverage",
    "drift": "support.drift",
    "config": "config.config",
    "push": "push.push",
    "serve": "serve.serve",
    "launch": "launch.launch",
    "doctor": "doctor.doctor",
    "setup-engine": "setup_engine.setup_engine",
    "data": "data.data",
    "convert": "convert.convert",
    "bench": "bench_step.bench",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit()


def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _make_app(names: Iterable[str]) -> typer.Typer:
    """The command with these of its commands, whose files are imported here."""
    made = typer.Typer(
        name="owpo",
        help="One-Way Policy Optimization on Megatron and SGLang. Start with: owpo quickstart",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_global)
    for name in names:
        home, _, attribute = _HOMES[name].partition(".")
        command = getattr(import_module(f"owpo_megatron.cli.{home}"), attribute)
        if isinstance(command, typer.Typer):
            made.add_typer(command, name=name)
        else:
            made.command(name)(command)
    return made


def __getattr__(name: str) -> Any:
    """`app`: the command with all of its commands."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = _make_app(_HOMES)
    return made


def main() -> None:
    """Entry point of the console script."""
    _read_utf8()
    _open_streams()
    # Imports are most of a short command, and what they make stays: looking for garbage among it takes up to half of
    # the time, at the end once more.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    asked = sys.argv[1:2]
    try:
        _stand_somewhere()
        app = _make_app(asked if set(asked) <= _HOMES.keys() and asked else _HOMES)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # during all imports: cli/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app(prog_name="owpo")
    except UserError as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(2)
    except (EngineError, ProofError) as error:
        err.print(f"[bold red]failed:[/bold red] {escape(str(error))}")
        sys.exit(1)
    except OSError as error:  # a path that is too long, a folder that is read-only, a disk that is full
        if error.filename is None or error.errno in LIMITS:
            err.print(f"[bold red]failed:[/bold red] {escape(one_line(error))}")
            sys.exit(1)
        why = f"{error.strerror}; check the path, its permissions and the space there"
        err.print(f"[bold red]failed:[/bold red] {escape(printable(str(error.filename)))}: {escape(why)}")
        sys.exit(1)


def _read_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale's encoding is another: files are UTF-8 everywhere, and what a
    prompt or a name contains must not depend on the terminal."""
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8" and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Standard streams that the caller has closed lead nowhere; the next file would take their place otherwise."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _stand_somewhere() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("working folder", "(removed)", "cd to a folder that exists") from error


if __name__ == "__main__":
    main()
