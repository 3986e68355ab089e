"""Seconds and bytes of the trainer's passes, from FLOPs and the product's own packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, forward_flops
from owpo_megatron.mcore.packing import plan_microbatches
from owpo_megatron.plan.hours import FULL_RECOMPUTATION
from owpo_megatron.plan.machine import Machine
from owpo_megatron.plan.parameters import share_of_stage, whole_model
from owpo_megatron.plan.trainer import GRADIENT

TOKEN = 8  # bytes of a response's token on its way to the ranks: id and log-prob


@dataclass(frozen=True)
class Pass:
    """One pass over samples.

    Attributes:
        seconds: time that the busiest data-parallel rank takes.
        busy: seconds with work, mean over the ranks, bubbles of the pipeline left out.
    """

    seconds: float = 0.0
    busy: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.seconds + other.seconds, self.busy + other.busy)


class TrainerCost:
    """The trainer on a number of GPUs, with the configuration's tp, cp and pp, and as many copies as fit.

    Raises:
        UserError: the GPUs are no multiple of tp * cp * pp.
    """

    def __init__(self, config: Config, model: HFModel, machine: Machine, gpus: int):
        par = config.parallel
        self._ranks = par.tp * par.cp * par.pp
        if gpus % self._ranks or not gpus:
            raise UserError("--nodes", gpus, f"GPUs of the trainer must be a multiple of tp * cp * pp = {self._ranks}")
        self.config, self.model, self.machine, self.gpus = config, model, machine, gpus
        self.dp = gpus // self._ranks
        self._matmul, self._attention = forward_flops(model)
        recomputes = config.recomputation.get("recompute_granularity") == "full"
        self.update_passes = float(FULL_RECOMPUTATION if recomputes else 3)
        self._weight = 4 if config.model.dtype == "float32" else 2

    def forward(self, tokens: Sequence[int], passes: float = 1.0) -> Pass:
        """Passes over samples of so many tokens, packed and dealt to the data-parallel ranks as a run does it."""
        if not tokens:
            return Pass()
        par, most = self.config.parallel, self.config.optimizer.tokens_per_microbatch
        plan = plan_microbatches(tokens, self.dp, most, attention=self._attention / self._matmul)
        speed = self.machine.peak * self.machine.mfu * self._ranks
        work = [
            sum(tokens[index] * (self._matmul + self._attention * tokens[index]) for pack in rank for index in pack)
            * (passes / speed)
            for rank in plan
        ]
        bubble = 1 + (par.pp - 1) / (len(plan[0]) * (par.vpp or 1))
        return Pass(max(work) * bubble, sum(work) / self.dp)

    def update(self, tokens: Sequence[int]) -> Pass:
        """Forward, backward, reduction of the gradients, gather of the parameters."""
        return self.forward(tokens, self.update_passes) + Pass(self.optimizer_bytes / self._between_copies)

    @property
    def optimizer_bytes(self) -> float:
        """Bytes that a GPU sends for one update: float32 gradients are reduced and scattered, weights gathered."""
        copies = self.dp * self.config.parallel.cp
        parameters = max(
            share_of_stage(self.model, self.config.parallel, stage).total for stage in range(self.config.parallel.pp)
        )
        return parameters * (GRADIENT + self._weight) * (copies - 1) / copies

    @property
    def push_bytes(self) -> float:
        """Bytes of the weights, which rank 0 sends to the engines."""
        return float(whole_model(self.model) * self._weight)

    @property
    def push_seconds(self) -> float:
        return self.push_bytes / self._between_copies

    @property
    def _between_copies(self) -> float:
        """byte/s between ranks with the same parameters, which lie in several nodes where there are several."""
        rates = self.machine.rates
        return rates.network if self.gpus > self.machine.gpus_per_node else rates.nvlink

    def bytes_by_link(self, tokens: Sequence[int], forwards: float) -> dict[str, float]:
        """Mean bytes that a GPU of the trainer sends in a step, by what they are for.

        Args:
            forwards: passes beside the update.

        Per layer a forward pass reduces twice over the tensor-parallel ranks, a backward pass again; keys and values
        go around the context-parallel ranks; hidden states go to the next stage, and their gradients back.
        """
        par, model = self.config.parallel, self.model
        share = sum(tokens) / self.dp / par.cp  # tokens on a GPU
        layers, hidden = model.num_layers / par.pp, model.hidden_size * self._weight
        passes = forwards + self.update_passes - 1  # the backward is two passes' work, and reduces as one
        reductions = 2 * layers * 2 * (par.tp - 1) / par.tp * hidden
        around = 2 * model.size("kv") / par.tp * self._weight * layers * (par.cp - 1)
        stages = hidden / (par.tp if par.sp else 1) * (par.pp - 1) / par.pp
        return {
            "tensor_parallel": share * reductions * passes,
            "context_parallel": share * around * (passes + 1),
            "pipeline": share * stages * passes,
            "gradients_and_parameters": self.optimizer_bytes * self.config.optimizer.updates_per_step,
            "samples": sum(tokens) * TOKEN / self.dp,  # ranks receive those that they train on
            "weights_to_engines": self.push_bytes,  # rank 0 alone
        }
