"""Convert, train, evaluate, export: four jobs that wait for each other.

    make nemo
    .venv-nemo/bin/python examples/nemo_run/pipeline.py run.yaml /models/Qwen3-8B-Base

When a job fails the rest is cancelled, and the exit code is 1. --where local runs them here, one after the
other; --ssh USER@HOST:FOLDER submits from a login node, where the working folder must have the same path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch.job import Job, quoted
from owpo_megatron.launch.nemo.pipeline import SSH, Pipeline
from owpo_megatron.launch.nemo.request import Request


def main() -> int:
    """Exit code 0: all ended well; 1: one failed; 2: the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the run; its model.path becomes the converted folder")
    parser.add_argument("hf", type=Path, help="HF folder of the base model")
    parser.add_argument("--where", choices=["slurm", "local"], default="slurm")
    parser.add_argument("--ssh", metavar="USER@HOST:FOLDER", help="a login node, and a folder there")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    args = parser.parse_args()

    config = Config.load(args.config)
    converted, exported = Path("cache") / "converted" / args.hf.name, config.run_dir / "exported"
    config = Config.load(args.config, [f"model.path={converted}"])
    job = Job(config, Path.cwd())
    owpo = f"{quoted(job.python)} -m owpo_megatron.cli.main"

    pipeline = Pipeline(f"{config.name}-pipeline", config.run_dir / "launch" / "nemo", _where(args))
    convert = pipeline.add(
        Request.command("convert", f"{owpo} convert import --hf {quoted(args.hf)} --out {quoted(converted)}", job)
    )
    train = pipeline.add(Request.of(job), after=[convert])
    evaluate = f"{owpo} eval -c {quoted(config.run_dir / 'config.yaml')}"
    pipeline.add(Request.command("eval", evaluate, job), after=[train])
    newest = f'"$(ls -d {quoted(config.run_dir)}/checkpoints/step_* | tail -n 1)"'
    export = f"{owpo} convert export --megatron {newest} --out {quoted(exported)}"
    pipeline.add(Request.command("export", export, job), after=[train])

    if args.dry_run:
        for name, script in pipeline.render().items():
            print(f"# ==== {name}\n{script}")
        return 0
    return pipeline.run()


def _where(args: argparse.Namespace) -> str | SSH:
    if args.ssh is None:
        return str(args.where)
    login, _, folder = args.ssh.partition(":")
    user, _, host = login.partition("@")
    return SSH(user, host, folder)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
