"""One run a learning rate and seed, all in the queue at once; the exit code is 0 when every one ended well.

make nemo
.venv-nemo/bin/python examples/nemo_run/sweep.py run.yaml --lr 5e-7 1e-6 2e-6 --seed 1 2
owpo report runs/NAME-lr1e-06-seed1 runs/NAME-lr2e-06-seed1
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.nemo.pipeline import Pipeline
from owpo_megatron.launch.nemo.request import Request


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--lr", type=float, nargs="+", required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--where", choices=["slurm", "local"], default="slurm")
    args = parser.parse_args()

    base = Config.load(args.config)
    pipeline = Pipeline(f"{base.name}-sweep", base.runs_dir / f"{base.name}-sweep", args.where)
    for lr, seed in itertools.product(args.lr, args.seed):
        overrides = [f"name={base.name}-lr{lr:g}-seed{seed}", f"optimizer.lr={lr!r}", f"seed={seed}"]
        pipeline.add(Request.of(Job(Config.load(args.config, overrides), Path.cwd())))
    return pipeline.run()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
