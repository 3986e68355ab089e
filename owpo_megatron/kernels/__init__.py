"""The LM head: log-probs and entropies of chosen tokens, without ever holding the logits of all of them."""

from owpo_megatron.kernels.head import vocab_parallel_logprob

__all__ = ["vocab_parallel_logprob"]
