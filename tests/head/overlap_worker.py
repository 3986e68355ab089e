"""Gradients of a tied or untied head through megatron's DDP with overlap_grad_reduce on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def gradients(topology: Any, tied: bool, overlap: bool) -> dict[str, Any]:
    """main_grad of every parameter after two microbatches, summed over the ranks by megatron."""
    import torch
    from head_oracle import dense_logp, make_batch, make_inputs
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from owpo_megatron.head import Head
    from owpo_megatron.mcore import cpu
    from owpo_megatron.methods import make_method

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, weight_VH, _ = make_inputs(dtype=torch.float32)
            self.embedding = torch.nn.Parameter(weight_VH)
            self.body = torch.nn.Parameter(torch.eye(8))
            self.head = self.embedding if tied else torch.nn.Parameter(weight_VH.flip(0).contiguous())
            self.head.zero_out_wgrad = tied

        def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
            return self.embedding[ids_T] @ self.body

    with cpu.scope():
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=False
        )
        model = DistributedDataParallel(config, ddp_config, Model())
    model.zero_grad_buffer()
    for index in range(2):
        _, _, ids_T = make_inputs(seed=10 * topology.dp_rank + index)
        target_T = ids_T.roll(-1)

        def step(ids_T: torch.Tensor = ids_T, target_T: torch.Tensor = target_T) -> None:
            h_TH = model(ids_T)
            batch = make_batch(dense_logp(h_TH.detach(), model.module.head.detach(), target_T)[0])
            Head(model.module.head).loss(h_TH, target_T, batch, make_method("owpo")).loss_sum.backward()

        if index == 0:
            with model.no_sync():
                step()
        else:
            step()
    model.finish_grad_sync()
    return {name: param.main_grad.clone() for name, param in model.module.named_parameters()}


def compare(model: Path) -> list[dict[str, Any]]:
    """Return the checks that held with an untied and with a tied head."""
    import torch
    from tiny import make_config

    from owpo_megatron.mcore.topology import init_topology

    config = make_config(model, parallel={"dp": 2})
    topology = init_topology(config.parallel, config.seed)
    found = []
    for tied in (False, True):
        waits, overlaps = gradients(topology, tied, overlap=False), gradients(topology, tied, overlap=True)
        everywhere = topology.all_gather({name: grad.tolist() for name, grad in overlaps.items()})
        found.append(
            {
                "tied": tied,
                "names": sorted(overlaps),
                "same": all(torch.equal(waits[name], overlaps[name]) for name in waits),
                "ranks_agree": everywhere[0] == everywhere[1],
                "smallest": min(float(grad.abs().max()) for grad in overlaps.values()),
            }
        )
    return found
