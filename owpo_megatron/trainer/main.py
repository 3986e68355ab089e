"""One rank of a run: `torchrun -m owpo_megatron.trainer.main --config FILE` (the `owpo` command starts it)."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.errors import EngineError, UserError, one_line
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.types import Verifier

SPARE_BYTES = 4096


def main(argv: list[str] | None = None, verifier: Verifier | None = None) -> int:
    """Run this rank, with `verifier` in place of the configuration's.

    Returns:
        Exit code 0: done, or stopped on request; 2: the user's mistake; 1: a failure (logs/error_rank_N.txt).
    """
    parser = argparse.ArgumentParser(prog="owpo_megatron.trainer.main", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved YAML configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="changes for this attempt alone")
    parser.add_argument("--error-dir", type=Path, help="folder for error_rank_N.txt; default: logs/ of the run folder")
    parser.add_argument("--stop-file", type=Path, help="once it exists, the step is finished and saved")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the newest checkpoint (or the model)")
    parser.add_argument("--checkpoint", type=Path, help="with --eval-only: this step_... folder")
    args = parser.parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    config = Config.load(args.config, args.overrides)
    logs = args.error_dir or RunFolder.of(config).logs
    logs.mkdir(parents=True, exist_ok=True)
    error_file = logs / f"error_rank_{rank}.txt"
    error_file.unlink(missing_ok=True)
    spare = logs / f".spare_rank_{rank}"
    try:
        spare.write_bytes(b"\n" * SPARE_BYTES)
        gc.disable()  # what imports make stays: looking for garbage among it takes a fifth of their time
        from owpo_megatron.trainer.given import Given
        from owpo_megatron.trainer.train import evaluate_run, train_run

        gc.freeze()
        gc.enable()
        if args.eval_only:
            evaluate_run(config, args.checkpoint)
        else:
            train_run(config, args.stop_file, Given(verifier=verifier), logs=logs)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return report(error, error_file, rank, spare)
    finally:
        with suppress(OSError):  # not there, or the disk is read-only by now
            spare.unlink()
    return 0


def report(error: BaseException, error_file: Path, rank: int, spare: Path) -> int:
    """Write why this rank failed, where launch/reason.py reads it; returns the exit code.

    Args:
        spare: a file of SPARE_BYTES that becomes the error file where the disk is too full for another one.
    """
    is_mistake = isinstance(error, UserError)
    # The launcher shows the last line: the reason, not the last line of an engine's log that comes with it.
    content = f"error: {error}\n" if is_mistake else f"{traceback.format_exc()}\n{one_line(error)}\n"
    try:
        error_file.parent.mkdir(parents=True, exist_ok=True)  # the folder may be gone
        error_file.write_text(content)
    except OSError as refused:
        try:
            with spare.open("r+b") as file:  # over bytes that have their place on the disk
                file.write(content.encode()[-SPARE_BYTES:])
                file.truncate()
            os.replace(spare, error_file)
        except OSError:  # read-only, or gone
            print(f"{one_line(error)} ({error_file} could not be written: {refused.strerror})", flush=True)
    with suppress(OSError):  # stderr is a file on the same disk
        if not is_mistake:
            traceback.print_exc()
        elif rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
    details = str(error).partition("\n")[2]
    if isinstance(error, EngineError) and details:
        print(details, flush=True)
    return 2 if is_mistake else 1


if __name__ == "__main__":
    code = main()
    with suppress(OSError):  # onto a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    # Other ranks may wait in a collective for a rank that failed; do not wait for them while the groups are torn down.
    os._exit(code)
