"""Qwen3, dense: a norm on each head's queries and keys, heads of their own size."""

from owpo_megatron.families.rules import DENSE_RULES, QK_NORM_RULES, Family

QWEN3 = Family("qwen3", ("qwen3",), (*DENSE_RULES, *QK_NORM_RULES), qk_norm=True)
