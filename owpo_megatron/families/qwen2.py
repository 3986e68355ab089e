"""Qwen2 and Qwen2.5 (Qwen2.5-Math among them): dense, with a bias on queries, keys and values."""

from owpo_megatron.families.rules import DENSE_RULES, QKV_BIAS_RULE, Family

QWEN2 = Family("qwen2", ("qwen2",), (*DENSE_RULES, QKV_BIAS_RULE), qkv_bias=True)
