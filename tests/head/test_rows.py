"""Rows of the backward products that are chosen before the first chunk, as on a GPU: same gradients, no row too few.

That nothing is read from the device per chunk is asserted by tests/project/test_dry_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from head_oracle import make_batch, make_inputs

from owpo_megatron.head import Head, HeadLoss
from owpo_megatron.methods import Method, catalogue, make_method
from owpo_megatron.methods.method import ChunkBatch, Terms
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.types import TokenBatch

NAMES = sorted(catalogue())


def run(method: Method, batch: TokenBatch, plans_rows: bool, rows: int = 60) -> tuple[HeadLoss, list[torch.Tensor]]:
    h_TH, weight_VH, target_T = make_inputs(rows=rows)
    leaves = (h_TH.requires_grad_(), weight_VH.requires_grad_())
    out = Head(leaves[1], 0.7, chunk_rows=16, plans_rows=plans_rows).loss(leaves[0], target_T, batch, method)
    return out, list(torch.autograd.grad(out.loss_sum, leaves))


def batch_of(method: Method, rows: int = 60) -> TokenBatch:
    """A batch of three groups, prepared where the method's tokens depend on each other."""
    h_TH, weight_VH, target_T = make_inputs(rows=rows)
    now = Head(weight_VH, 0.7).logprobs(h_TH, target_T, statistic=method.statistic)
    batch = replace(
        make_batch(now.logp_T),
        reward_S=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        group_S=torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    if method.coupling == "token":
        return batch
    return prepared_in_microbatch(method, batch, now.logp_T, now.entropy_T, now.statistic_T)


@pytest.mark.parametrize(("entropy_coef", "masked"), [(0.0, True), (0.2, False)])
@pytest.mark.parametrize("name", NAMES)
def test_same_loss_and_gradients(name: str, entropy_coef: float, masked: bool) -> None:
    method = make_method(name, entropy_coef=entropy_coef)
    batch = batch_of(method)
    if masked:
        batch = replace(batch, row_mask_T=batch.mask_T)
    exact, expected = run(method, batch, plans_rows=False)
    planned, found = run(method, batch, plans_rows=True)
    for name_of in ("loss_sum", "logp_T", "entropy_T"):
        assert torch.equal(getattr(planned, name_of), getattr(exact, name_of))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    skips = method.idle_without_advantage and not method.has_entropy_bonus
    live_T = batch.mask_T & (batch.advantage_T != 0) if skips else batch.mask_T
    assert planned.rows.gradient == int(live_T.sum()) >= exact.rows.gradient
    assert planned.rows.forward == exact.rows.forward


@pytest.mark.parametrize("name", [name for name in NAMES if make_method(name).idle_without_advantage])
def test_declared_methods_have_no_gradient_without_an_advantage(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(500, generator=generator, dtype=torch.float64)

    logp_C = (-noise().abs()).requires_grad_()
    batch = ChunkBatch(
        old_logp_C=logp_C.detach() + noise(), ref_logp_C=logp_C.detach() + noise(),
        advantage_C=torch.zeros(500, dtype=torch.float64), active_C=noise() > 0,
        behaviour_logp_C=logp_C.detach() + noise(), entropy_C=noise().abs(), external_C=noise() > 1,
        off_policy_C=noise() > 1,
    )  # fmt: skip
    method = make_method(name)
    if method.coupling != "token":
        given = batch_of(method).given
        batch = replace(batch, given={key: value.flatten()[0].expand(500) for key, value in given.items()})
    (slope_C,) = torch.autograd.grad(method.terms(logp_C, batch).value_C.sum(), logp_C)
    assert not slope_C.any()


def test_chunks_without_a_live_row() -> None:
    """The second chunk of four has none, and a microbatch may have none at all."""
    method = make_method("owpo")
    batch = batch_of(method)
    advantage_T = batch.advantage_T.clone()
    advantage_T[16:32] = 0
    for part in (replace(batch, advantage_T=advantage_T), replace(batch, advantage_T=advantage_T * 0)):
        expected, found = run(method, part, plans_rows=False)[1], run(method, part, plans_rows=True)[1]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Wrong(Method):
    """A method with a gradient everywhere that declares to have none."""

    name = "wrong"
    summary = "log pi"
    idle_without_advantage = True

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return Terms(logp_C)


def test_a_wrong_declaration_is_not_believed() -> None:
    with pytest.raises(RuntimeError, match="without advantage has a gradient"):
        run(Wrong(), batch_of(Wrong()), plans_rows=True)
