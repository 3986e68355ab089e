"""Llama 2 and 3, and Mistral without a sliding window: dense, no biases, no head norms."""

from owpo_megatron.convert.rules import DENSE_RULES, Family

LLAMA = Family("llama", ("llama", "mistral"), DENSE_RULES)
