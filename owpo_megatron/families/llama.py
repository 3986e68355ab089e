"""Llama 2 and 3: dense, no biases, no head norms."""

from owpo_megatron.families.rules import DENSE_RULES, Family

LLAMA = Family("llama", ("llama",), DENSE_RULES)
