"""`owpo launch --with nemo-run`, in NeMo-Run's environment: runner.py REQUEST.json HOME RESULT.json [--dry-run]."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from owpo_megatron.errors import UserError
from owpo_megatron.launch.nemo.pipeline import Pipeline
from owpo_megatron.launch.nemo.request import Request


def main() -> int:
    """Submit one task and write its job number, or show its batch script. Exit code 2: the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    request = Request.load(args.request)
    pipeline = Pipeline(request.name, args.home)
    try:
        pipeline.add(request)
        found = (
            {"script": pipeline.render()[request.name]} if args.dry_run else {"job": pipeline.submit()[request.name]}
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.result.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
