"""Gradients that are formed in the forward, and how autograd and megatron get them in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from owpo_megatron.head.backend import wide


class FormedGradients:
    """Buffers for the gradients of h and the weight, where autograd wants them.

    Where the weight has megatron's `main_grad` its gradient goes there at once. That needs d total / d loss_sum
    beforehand: it is 1, since losses are sums that are divided once by the global count. The backward asserts it.
    """

    def __init__(self, h_TH: torch.Tensor, weight_VH: torch.Tensor):
        wants_h = torch.is_grad_enabled() and h_TH.requires_grad
        wants_weight = torch.is_grad_enabled() and weight_VH.requires_grad
        self.wanted = wants_h or wants_weight
        self.dh_TH = torch.zeros_like(h_TH, requires_grad=False) if wants_h else None
        self.dweight_VH: torch.Tensor | None = None
        self._main_grad = getattr(weight_VH, "main_grad", None) if wants_weight else None
        if wants_weight and (self._main_grad is None or self._main_grad.dtype != wide(h_TH)):
            self.dweight_VH = torch.zeros(weight_VH.shape, dtype=wide(h_TH), device=h_TH.device)
        self.in_main_grad = self._main_grad is not None

    @property
    def sum_VH(self) -> torch.Tensor | None:
        """Buffer to which chunks add the weight's gradient; None if it is not needed."""
        return self.dweight_VH if self.dweight_VH is not None else self._main_grad

    def finish(self) -> None:
        """After the last chunk. A main_grad below float32 is rounded once, not once per chunk."""
        if self._main_grad is not None and self.dweight_VH is not None:
            self._main_grad.add_(self.dweight_VH)
            self.dweight_VH = None


def attach(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, loss_sum: torch.Tensor, formed: FormedGradients
) -> torch.Tensor:
    """`loss_sum` as a function of h and the weight, with these gradients."""
    return _Attach.apply(h_TH, weight_VH, loss_sum, formed)


class _Attach(torch.autograd.Function):
    """Hands gradients that exist already to autograd."""

    @staticmethod
    def forward(
        ctx: Any, h_TH: torch.Tensor, weight_VH: torch.Tensor, loss_sum: torch.Tensor, formed: FormedGradients
    ) -> torch.Tensor:
        ctx.formed, ctx.weight_VH = formed, weight_VH
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        formed: FormedGradients = ctx.formed
        assert formed is not None, "the head's gradients were handed out already: one backward a forward"
        ctx.formed = None
        if not formed.in_main_grad:
            dh_TH = None if formed.dh_TH is None else formed.dh_TH.mul_(grad)
            dweight_VH = None if formed.dweight_VH is None else formed.dweight_VH.mul_(grad).to(ctx.weight_VH.dtype)
            return dh_TH, dweight_VH, None, None
        torch._assert_async(grad == 1, "main_grad was formed for an upstream gradient of 1")
        return formed.dh_TH, _added_to_main_grad(ctx.weight_VH), None, None


def _added_to_main_grad(weight_VH: torch.Tensor) -> torch.Tensor:
    """Return a dummy for a gradient that was already added, so that megatron's hook fires (overlap_grad_reduce waits).

    As in megatron's linear layers: the mark keeps the hook from adding it, unless the weight is an embedding too
    (`zero_out_wgrad`), where it is summed with the embedding's gradient and must be zeros. Otherwise nobody reads it,
    and the memory of main_grad itself is shown under the weight's dtype instead of 1.2 GiB more.
    """
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    main_grad: torch.Tensor = weight_VH.main_grad  # type: ignore[attr-defined]
    if getattr(weight_VH, "zero_out_wgrad", False) or main_grad.element_size() < weight_VH.element_size():
        return torch.zeros_like(weight_VH)
    return main_grad.view(-1).view(weight_VH.dtype)[: weight_VH.numel()].view(weight_VH.shape)
