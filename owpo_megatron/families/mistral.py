"""Mistral: Llama's table. One with an attention window can be used up to its length, where it is plainly causal."""

from owpo_megatron.families.rules import DENSE_RULES, Family

MISTRAL = Family("mistral", ("mistral",), DENSE_RULES)
