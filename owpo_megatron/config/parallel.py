"""Section `parallel`: how ranks divide the model and the tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from owpo_megatron.config.file import Section

Overlap = Literal["none", "gradients", "all"]


class ParallelConfig(Section):
    tp: int = Field(1, gt=0)
    """Tensor-parallel ranks."""
    pp: int = Field(1, gt=0)
    """Pipeline stages. Where it does not divide the layers, the first and the last stage have fewer."""
    dp: int = Field(1, gt=0)
    """Data-parallel ranks. The run has tp x cp x pp x dp ranks."""
    cp: int = Field(1, gt=0)
    """Context-parallel ranks: each sequence is split among them, so that a rank holds 1 / cp of the tokens of a
    microbatch (`optimizer.tokens_per_microbatch` counts all of them)."""
    vpp: int | None = Field(None, ge=2)
    """Virtual pipeline stages per rank (needs pp > 1)."""
    sp: bool = False
    """Sequence parallelism inside the tensor-parallel group (needs tp > 1)."""
    ep: int = Field(1, gt=0)
    """Expert parallelism: distribute a layer's experts over data- and context-parallel ranks; must divide dp x cp."""
    etp: int | None = Field(None, gt=0)
    """Ranks that share each expert's matrices; null: all tp ranks. With fewer, a divisor of tp, experts are spread over
    the tensor-parallel ranks as well: etp x ep must divide tp x cp x dp."""
    overlap: Overlap = "none"
    """What ranks with the same parameters exchange while they compute. `gradients`: reduce gradients while the last
    backward of an update goes on; `all`: also gather the updated parameters while the next update's first forward goes
    on. true and false mean `gradients` and `none`."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward instead of kept. `selective`: those inside attention, or of
    `megatron.recompute_modules`; `full`: all but each layer's input, which costs one forward pass per update. For less
    than all layers use megatron-core's `megatron.recompute_granularity`, `recompute_method` and `recompute_num_layers`
    instead."""

    @field_validator("overlap", mode="before")
    @classmethod
    def _flag_of_overlap(cls, value: Any) -> Any:
        return {True: "gradients", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def recompute_fields(self) -> dict[str, Any]:
        """Return `recompute` as fields of megatron-core's TransformerConfig."""
        if self.recompute == "none":
            return {}
        layers = {"recompute_method": "uniform", "recompute_num_layers": 1} if self.recompute == "full" else {}
        return {"recompute_granularity": self.recompute, **layers}

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense parameters, and share their optimizer."""
        return self.dp * self.cp

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert's matrices."""
        return self.etp or self.tp

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same parameters of experts, and share their optimizer."""
        return self.tp * self.copies // (self.expert_tp * self.ep)

    @property
    def sizes(self) -> str:
        """Return the sizes in words, as programs print them.

        Example:
            >>> ParallelConfig(tp=2, cp=2).sizes
            'tp 2, cp 2, pp 1, dp 1'
        """
        return f"tp {self.tp}, {f'cp {self.cp}, ' if self.cp > 1 else ''}pp {self.pp}, dp {self.dp}"
