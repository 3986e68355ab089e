"""Work of a forked rank of the suite: the trainer's entry point, with its streams and exit code as the command's."""

from __future__ import annotations

import importlib
import os
import sys


def train(config: str, path: str | None, before: str | None, argument: object) -> None:
    """Run one rank and end the process with the trainer's exit code.

    Args:
        path: PYTHONPATH of this process and those that it starts; None: as it is.
        before: `module:function` of this folder that breaks something in this process before it trains.
        argument: what that function is called with.
    """
    from owpo_megatron.trainer.main import main

    if path is not None:
        os.environ["PYTHONPATH"] = path
        sys.path[:0] = path.split(os.pathsep)
    if before is not None:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)(argument)
    code = main(["--config", config])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
