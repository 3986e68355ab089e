#!/usr/bin/env python3
"""Convert a megatron folder, or the policy of a run's checkpoint, to an HF checkpoint folder.

    .venv/bin/python tools/convert_megatron_to_hf.py --megatron models/Qwen3-8B-megatron --out models/Qwen3-8B-again
    .venv/bin/python tools/convert_megatron_to_hf.py --megatron runs/NAME/checkpoints/step_000080 --out models/step80

Config, tokenizer, generation config and chat template come from the megatron folder's hf/, or, for a checkpoint, from
the folder that its run's config.yaml names as model.path; --hf-template names another one. It runs in one process on
the CPU, needs memory for the model twice, and keeps every bit; the folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: the user's mistake, told in one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR", help="converted folder, or a step_N folder of a run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="HF folder to make")
    parser.add_argument("--hf-template", type=Path, metavar="DIR", help="HF folder with config and tokenizer to use")
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model stays in host memory, wherever this runs

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from owpo_megatron.errors import UserError
    from owpo_megatron.policy.export import megatron_to_hf
    from owpo_megatron.trainer.checkpoints import verify_manifest

    terminal = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bars = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
    try:
        if (args.megatron / "manifest.json").is_file() and not verify_manifest(args.megatron):
            raise UserError("megatron", args.megatron, "a file is not what its manifest says; take another checkpoint")
        with bars:
            bar = bars.add_task("parameters", total=None)
            megatron_to_hf(
                args.megatron,
                args.out,
                args.hf_template,
                lambda done, total: bars.update(bar, completed=done, total=total),
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
