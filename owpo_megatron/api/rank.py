"""One rank of a run that `train` started: `python -m owpo_megatron.api.rank GIVEN [arguments of trainer.main]`.

GIVEN holds the method and the verifier that were given from Python (api/given.py); the rest is the trainer's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from owpo_megatron.api.given import GivenParts
from owpo_megatron.trainer.main import main as trainer_main


def main(given_file: Path, arguments: list[str]) -> int:
    """The trainer's exit code."""
    given = GivenParts.read(given_file)
    with given.known():
        return trainer_main(arguments, given.verifier)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as trainer/main.py does, and for its reason
