"""The section `optimizer:`: updates, learning rate and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError

# A moment in bfloat16 that loses less than 2^-8 of itself per update may be rounded to what it was, for ever.
_LARGEST_ROUNDED_DECAY = 0.99


class OptimizerConfig(Section):
    steps: int = Field(400, gt=0)
    """Steps of the run; each one draws new rollouts."""
    updates_per_step: int = Field(16, gt=0)
    """Optimizer updates per step: the step's prompts are split into as many minibatches."""
    name: Literal["adam", "muon"] = "adam"
    """`adam`: AdamW. `muon` is refused: megatron-core's does not work with the distributed optimizer, whose contiguous
    buffers make swaps of the reference and resumes exact."""
    lr: float = Field(1e-6, gt=0)
    """Adam's learning rate, after warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Optimizer updates over which the learning rate rises from 0 to lr."""
    lr_schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Learning rate after warm-up: `constant`; `cosine` or `linear` from lr to min_lr at the last update; `wsd`
    (warm-up, stable, decay): lr, then linearly to min_lr over the last `decay_steps` steps."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a schedule that decays."""
    decay_steps: int = Field(0, ge=0)
    """With `wsd`: steps (not updates) of the final decay."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay (AdamW)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay rate of the gradient's mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's decay rate of the gradient's square."""
    eps: float = Field(1e-8, gt=0)
    """Adam's term in the denominator."""
    clip_grad: float = Field(1.0, gt=0)
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""
    offload: bool = False
    """Keep Adam's moments and float32 masters in host memory, and on the GPU only during steps, when no activations are
    there. Each update moves 12 bytes per parameter both ways, divided by dp x cp."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's moments between steps. Steps are made in float32; `bfloat16` rounds the moments after each and
    frees 4 of 12 bytes per parameter (of 8 without masters), divided by dp x cp, while activations are there."""
    tokens_per_microbatch: int = Field(16384, gt=0)
    """Samples are packed into microbatches of at most this many tokens (a longer sample gets its own). Affects memory
    and speed, not the result."""

    @model_validator(mode="after")
    def _one_schedule(self) -> OptimizerConfig:
        if self.name == "muon":
            raise UserError(
                "optimizer.name",
                "muon",
                "not supported: megatron-core's Muon does not work with the distributed optimizer, whose contiguous "
                "buffers hold the reference; use adam",
            )
        if self.moments == "bfloat16" and max(self.beta1, self.beta2) > _LARGEST_ROUNDED_DECAY:
            name = "beta1" if self.beta1 > _LARGEST_ROUNDED_DECAY else "beta2"
            raise UserError(
                f"optimizer.{name}",
                getattr(self, name),
                f"cannot exceed {_LARGEST_ROUNDED_DECAY} with optimizer.moments bfloat16, whose eight bits would round "
                "a decay as slow as this away",
            )
        if (self.lr_schedule == "wsd") != (self.decay_steps > 0):
            raise UserError(
                "optimizer.decay_steps", self.decay_steps, "goes with optimizer.lr_schedule wsd: set both or neither"
            )
        if self.decay_steps > self.steps:
            raise UserError("optimizer.decay_steps", self.decay_steps, f"cannot exceed optimizer.steps = {self.steps}")
        if self.min_lr > self.lr:
            raise UserError("optimizer.min_lr", self.min_lr, f"cannot exceed optimizer.lr = {self.lr:g}")
        if self.min_lr and self.lr_schedule == "constant":
            raise UserError("optimizer.min_lr", self.min_lr, "a constant learning rate has none; set lr_schedule")
        updates = self.steps * self.updates_per_step
        if self.lr_schedule != "constant" and self.warmup_steps >= updates:
            raise UserError(
                "optimizer.warmup_steps", self.warmup_steps, f"leaves nothing of the {updates} updates to decay over"
            )
        return self
