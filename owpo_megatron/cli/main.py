"""The `owpo` command. Exit codes: 0 done, 1 failure, 2 user mistake. Imports no torch."""

from __future__ import annotations

import codecs
import locale
import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from owpo_megatron import __version__
from owpo_megatron.cli.bench import bench
from owpo_megatron.cli.bench_step import growth, start, step
from owpo_megatron.cli.compare import compare
from owpo_megatron.cli.config import config
from owpo_megatron.cli.convert import convert
from owpo_megatron.cli.data import data
from owpo_megatron.cli.doctor import doctor
from owpo_megatron.cli.evaluate import evaluate
from owpo_megatron.cli.launch import launch
from owpo_megatron.cli.methods import methods
from owpo_megatron.cli.options import err, out
from owpo_megatron.cli.plan import plan
from owpo_megatron.cli.protocol import protocol
from owpo_megatron.cli.push import push
from owpo_megatron.cli.quickstart import quickstart
from owpo_megatron.cli.replay import replay
from owpo_megatron.cli.report import report
from owpo_megatron.cli.reproduce import reproduce
from owpo_megatron.cli.runs import runs
from owpo_megatron.cli.samples import samples
from owpo_megatron.cli.serve import serve
from owpo_megatron.cli.setup_engine import setup_engine
from owpo_megatron.cli.support import coverage, drift
from owpo_megatron.cli.train import train
from owpo_megatron.cli.verify import verify
from owpo_megatron.errors import LIMITS, EngineError, ProofError, UserError, one_line, printable

app = typer.Typer(
    name="owpo",
    help="One-Way Policy Optimization on Megatron and SGLang. Start with: owpo quickstart",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("verify")(verify)
app.command("compare")(compare)
app.command("plan")(plan)
app.command("methods")(methods)
app.add_typer(protocol, name="protocol")
app.command("reproduce")(reproduce)
app.command("report")(report)
app.command("samples")(samples)
app.command("replay")(replay)
app.command("runs")(runs)
app.command("coverage")(coverage)
app.command("drift")(drift)
app.add_typer(config, name="config")
app.command("push")(push)
app.command("serve")(serve)
app.add_typer(launch, name="launch")
app.command("doctor")(doctor)
app.command("setup-engine")(setup_engine)
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(bench, name="bench")
bench.command("step")(step)
bench.command("start")(start)
bench.command("growth")(growth)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    _read_utf8()
    _open_streams()
    try:
        _stand_somewhere()
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
