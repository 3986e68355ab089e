"""owpo launch: submit runs to a cluster and manage their jobs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from owpo_megatron.cli.options import ConfigFile, Overrides, err, note, out, this_command
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.hub import with_local_models
from owpo_megatron.run.layout import RunFolder

if TYPE_CHECKING:
    from owpo_megatron.launch.job import Job

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder, e.g. runs/my-run.")]
Launcher = Literal["slurm", "nemo-run", "kubernetes"]
POLL_SECONDS = 1.0


class _SubmitByDefault(TyperGroup):
    """Make `owpo launch -c FILE ...` mean `owpo launch submit -c FILE ...`, in its help, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["submit", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The options of a launch first, then the commands for launched runs."""
        submit = self.commands["submit"]
        with submit.make_context("launch", [], parent=ctx.parent, resilient_parsing=True) as inner:
            submit.format_help(inner, formatter)
        super().format_help(ctx, formatter)


launch = typer.Typer(
    cls=_SubmitByDefault,
    no_args_is_help=True,
    help="Run on a cluster: `owpo launch -c FILE --nodes N` submits a run; these commands manage submitted ones.",
)


@launch.command("submit")
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Trainer nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs per node; 0: a cluster of CPUs.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node; default: its GPUs.")] = None,
    engine_nodes: Annotated[
        int | None, typer.Option(min=0, help="Extra nodes for SGLang; 0: engines share the trainer's nodes.")
    ] = None,
    limit: Annotated[str | None, typer.Option("--time", metavar="TIME", help="Time limit, e.g. 04:00:00.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition (queue) to submit to.")] = None,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="Container image to run in.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="1,2,3", help="One run per seed, as a job array.")] = None,
    chain: Annotated[int, typer.Option(min=1, help="Number of chained jobs, for clusters that forbid requeueing.")] = 1,
    launcher: Annotated[
        Launcher, typer.Option("--with", help="Launcher; kubernetes only writes a manifest.")
    ] = "slurm",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and submit nothing.")] = False,
) -> None:
    """Check a run, write its job script into the run folder, and submit it.

    Flags override the `launch:` section of the file, which has more fields (owpo config explain launch). A job that
    fails, loses a node, is preempted or reaches its time limit is requeued and resumes from its last checkpoint.

    Example: owpo launch -c run.yaml --nodes 4 --engine-nodes 2 --time 04:00:00 --account lab
    """
    from owpo_megatron.launch.checks import check_downloads, check_job, check_model
    from owpo_megatron.launch.job import Job

    flags = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "engine_nodes": engine_nodes,
        "time": limit,
        "account": account,
        "partition": partition,
        "container": container,
    }
    given = [f"launch.{name}={_yaml(value)}" for name, value in flags.items() if value is not None]
    named = Config.load(config, [*(overrides or []), *given])
    settings = with_local_models(named, note, weights=False)
    job = Job(settings, Path.cwd(), _seeds(seeds), chain)
    check_downloads(job, named)
    check_job(job)
    check_model(job)
    if not dry_run:
        with_local_models(named, lambda line: None)  # the weights, into the folders that the checks have seen
    if launcher == "kubernetes":
        _kubernetes(job, dry_run)
    elif launcher == "nemo-run":
        _nemo_run(job, dry_run)
    else:
        _slurm(job, dry_run)


@launch.command("status")
def status(run_dirs: Annotated[list[Path] | None, typer.Argument(metavar="RUN_DIR")] = None) -> None:
    """Show the jobs of run folders (default: all in runs/): state, attempt, nodes, step."""
    from owpo_megatron.launch.slurm import record

    folders = run_dirs or sorted(file.parent.parent for file in Path("runs").glob("*/launch/jobs.jsonl"))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("run", "job", "state", "attempt", "nodes", "step"):
        table.add_column(column)
    for folder in folders:
        submission = record.latest(folder)
        states = submission.states()
        for state in states:
            shown = escape(state.state + (f" ({state.reason})" if state.reason else ""))
            table.add_row(escape(str(folder)), state.id, shown, str(state.attempt), state.nodes, _progress(folder))
        if not states:
            jobs = ",".join(map(str, submission.jobs))
            table.add_row(escape(str(folder)), jobs, "unknown to Slurm", "", "", _progress(folder))
    out.print(table if folders else "no run was launched from this folder")


@launch.command("logs")
def logs(
    run_dir: RunDir,
    rank: Annotated[int | None, typer.Option(min=0, help="Show this trainer rank's log.")] = None,
    engine: Annotated[int | None, typer.Option(min=0, help="Show this engine's log.")] = None,
    attempt: Annotated[str | None, typer.Option(metavar="JOB.N", help="Attempt to show; default: the newest.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until Ctrl-C.")] = False,
) -> None:
    """Show the job's output, or the log of a rank or an engine."""
    from owpo_megatron.launch.slurm import record

    if rank is None and engine is None and attempt is None:
        file = Path(record.latest(run_dir).outputs[-1])
    else:
        name = f"engine_{engine}.log" if engine is not None else f"rank_{rank or 0}.log"
        file = _attempt(run_dir, attempt) / name
    if not file.exists():
        raise UserError("log", file, "does not exist (yet)")
    tail = _Tail(file)
    try:
        tail.show()
        while follow:
            time.sleep(POLL_SECONDS)
            tail.show()
    except KeyboardInterrupt:
        pass


@launch.command("cancel")
def cancel(
    run_dir: RunDir,
    save: Annotated[bool, typer.Option("--save", help="Finish and save the current step first.")] = False,
) -> None:
    """Cancel the jobs of a run; the next `owpo launch` resumes from the last checkpoint."""
    from owpo_megatron.launch.slurm import cluster, record

    active = record.latest(run_dir).active()
    if not active:
        raise UserError("run folder", run_dir, "has no running or queued job")
    for state in active:
        if save and state.state == "RUNNING":
            task = state.id.partition("_")[2]  # of an array: the seed, whose run has a folder of its own
            folder = run_dir.with_name(f"{run_dir.name}-seed{task}") if task else run_dir
            (folder / "launch" / f"stop.{state.number}.{state.attempt}").write_text("cancel\n")
            out.print(f"job {state.id} will finish its step and save (owpo launch status {escape(str(run_dir))})")
        else:
            cluster.cancel(state.number)
            out.print(f"job {state.id} cancelled")


@launch.command("attach")
def attach(run_dir: RunDir) -> None:
    """Stream the job's output until it ends. Ctrl-C detaches; the job keeps running.

    Exit code 0 if the job completed, else 1.
    """
    from owpo_megatron.launch.slurm import record

    submission = record.latest(run_dir)
    tails = [_Tail(Path(file)) for file in submission.outputs]
    before: list[str] = []
    try:
        while True:
            states = submission.states()
            now = [f"job {state.id}: {state.state.lower()} {state.reason}".rstrip() for state in states]
            for line in now:
                if line not in before:
                    err.print(escape(line), style="dim")
            before = now
            for tail in tails:
                tail.show()
            if all(state.ended for state in states):
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        err.print(f"the job keeps running; to cancel it: {this_command()} launch cancel {escape(str(run_dir))}")
        return
    if not states:
        raise UserError("run folder", run_dir, "Slurm no longer knows its job; see `owpo launch logs`")
    if not all(state.ended_well for state in states):
        raise typer.Exit(1)


def _slurm(job: Job, dry_run: bool) -> None:
    from owpo_megatron.launch.render import render_sbatch
    from owpo_megatron.launch.slurm.submit import submit_job

    if dry_run:
        out.print(render_sbatch(job), markup=False, end="")
        return
    _report_submitted(job, submit_job(job).jobs)


def _nemo_run(job: Job, dry_run: bool) -> None:
    from owpo_megatron.launch.nemo.call import render_nemo, submit_nemo

    if dry_run:
        out.print(render_nemo(job), markup=False, end="")
        return
    _report_submitted(job, submit_nemo(job).jobs)


def _kubernetes(job: Job, dry_run: bool) -> None:
    from owpo_megatron.launch.render import render_kubernetes
    from owpo_megatron.launch.slurm.submit import write_files

    if job.seeds or job.links > 1:
        raise UserError("--with", "kubernetes", "supports neither --seeds nor --chain; write one manifest per run")
    if job.launch.container is None:
        raise UserError("launch.container", "(missing)", "pods need an image; add --container IMAGE")
    manifest = render_kubernetes(job)
    if dry_run:
        out.print(manifest, markup=False, end="")
        return
    file = write_files(job, "pytorchjob.yaml", manifest)
    out.print(f"written: kubectl apply -f {escape(str(file))}")


def _report_submitted(job: Job, jobs: list[int]) -> None:
    run_dir = escape(str(job.config.run_dir))
    numbers = ", ".join(map(str, jobs))
    out.print(f"submitted: job {numbers}, {job.summary}")
    out.print(f"script: {run_dir}/launch")
    out.print(f"follow it with [bold]{escape(this_command())} launch attach {run_dir}[/bold] (or status, logs, cancel)")


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError("--seeds", text, "write integers separated by commas, e.g. 1,2,3") from None


def _yaml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _progress(run_dir: Path) -> str:
    """Number of finished steps, as text."""
    from owpo_megatron.run.metrics_reader import read_run

    if not RunFolder(run_dir).metrics.is_file():
        return ""
    run = read_run(run_dir)
    return str(max((step["step"] for step in run.steps), default=0))


def _attempt(run_dir: Path, name: str | None) -> Path:
    logs_dir = RunFolder(run_dir).logs
    if name is not None:
        return logs_dir / name
    attempts = [folder for folder in logs_dir.glob("*.*") if folder.is_dir()]
    if not attempts:
        raise UserError("run folder", run_dir, "has no attempt yet")
    return max(attempts, key=lambda folder: folder.stat().st_mtime)


class _Tail:
    """Prints what was appended to a file since the last call."""

    def __init__(self, file: Path):
        self._file, self._read = file, 0

    def show(self) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as opened:
            opened.seek(self._read)
            new = opened.read()
        self._read += len(new)
        if new:
            out.out(new.decode(errors="replace"), end="", highlight=False)
