"""owpo_megatron: One-Way Policy Optimization on Megatron and SGLang."""

__version__ = "0.1.0"
