"""Large imports used everywhere: the fork server of rank_pool.py imports them once, for all ranks of a session."""

from __future__ import annotations

import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import owpo_megatron.mcore.topology
import owpo_megatron.policy
import owpo_megatron.trainer.build  # noqa: F401

torch.set_num_threads(1)
