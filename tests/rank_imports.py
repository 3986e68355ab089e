"""What the fork server of rank_pool.py imports once, for all ranks of a session."""

from __future__ import annotations

import gc

import torch

import owpo_megatron.mcore.topology
import owpo_megatron.policy
import owpo_megatron.trainer.build  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is here now stays shared with the ranks
