"""The gate of a shared expert (Qwen2-MoE), which SGLang has as a Triton kernel alone."""

from __future__ import annotations

import torch


def gate_shared_output(
    hidden_states: torch.Tensor,  # [T, H]
    gate_weight: torch.Tensor,  # [H]
    shared_output: torch.Tensor,  # [T, H]
    output: torch.Tensor,  # [T, H], written
    *,
    do_add: bool,
) -> None:
    """output = sigmoid(hidden_states . gate_weight) * shared_output, or added to it. A row depends on its own alone."""
    gate_T1 = (hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True).sigmoid()
    gated = gate_T1 * shared_output.float()
    output.copy_((output.float() + gated if do_add else gated).to(output.dtype))
