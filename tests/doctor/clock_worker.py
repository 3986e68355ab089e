"""Two ranks that compare clocks: see test_doctor.py."""

from __future__ import annotations

import json
import time

import torch.distributed as dist

from owpo_megatron.doctor.collectives import clock_skew

dist.init_process_group("gloo")
ahead = 3.0 * dist.get_rank()
agreeing = clock_skew(dist.group.WORLD)
off = clock_skew(dist.group.WORLD, clock=lambda: time.time() + ahead)
if dist.get_rank() == 0:
    print("RESULT " + json.dumps({"agreeing": agreeing, "off": off}), flush=True)
dist.destroy_process_group()
