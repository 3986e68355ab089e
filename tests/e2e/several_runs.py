"""Trains the runs of several configuration files, one after the other in one process: several_runs.py FILE..."""

from __future__ import annotations

import sys
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.trainer.build import train_run

for file in sys.argv[1:]:
    train_run(Config.load(Path(file)))
