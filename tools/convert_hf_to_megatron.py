#!/usr/bin/env python3
"""Convert an HF checkpoint folder to a megatron folder, which `model.path` takes as well.

    .venv/bin/python tools/convert_hf_to_megatron.py --hf models/Qwen3-8B --out models/Qwen3-8B-megatron

The result holds state/ (sharded weights, readable at any tensor, pipeline and data parallel size) and hf/ (config,
tokenizer, generation config, chat template). It runs in one process on the CPU, needs memory for the model once, and
keeps every bit; the folder appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: the user's mistake, told in one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="HF folder: config.json and .safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="megatron folder to make")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the result (default: of the HF weights)")
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model stays in host memory, wherever this runs

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from owpo_megatron.errors import UserError
    from owpo_megatron.policy.export import hf_to_megatron

    terminal = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bars = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
    try:
        with bars:
            bar = bars.add_task("parameters", total=None)
            hf_to_megatron(
                args.hf, args.out, args.dtype, lambda done, total: bars.update(bar, completed=done, total=total)
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
