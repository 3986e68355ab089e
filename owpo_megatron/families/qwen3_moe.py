"""Qwen3 with experts in every layer (30B-A3B, 235B-A22B): Qwen3's attention, a router, no shared expert."""

from owpo_megatron.families.rules import MOE_RULES, QK_NORM_RULES, Family

QWEN3_MOE = Family("qwen3_moe", ("qwen3_moe",), (*MOE_RULES, *QK_NORM_RULES), qk_norm=True, experts=True)
