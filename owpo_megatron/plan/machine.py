"""GPUs and links of an imagined cluster, and what of their data sheets is reached."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.errors import UserError
from owpo_megatron.run.speed import PEAKS


@dataclass(frozen=True)
class Gpu:
    """Byte/s of one GPU, from its vendor's data sheets."""

    memory: float
    nvlink: float  # one direction of its link inside a node
    network: float  # one direction of a network card of 400 Gbit/s (A100: 200) for each GPU


GPUS = {
    "H200": Gpu(4.8e12, 450e9, 50e9),
    "H100": Gpu(3.35e12, 450e9, 50e9),
    "H20": Gpu(4.0e12, 450e9, 50e9),
    "A100": Gpu(2.04e12, 300e9, 25e9),
}


# What an engine's step takes however little it reads and computes; guesses, as no GPU was measured.
LAUNCHES = 24e-6  # seconds of a layer's dozen of kernels in a CUDA graph
REDUCTION = 15e-6  # seconds of a small all-reduce among the GPUs of a node; a layer has two
HOST = 1.5e-3  # seconds of scheduling and sampling between two steps


@dataclass(frozen=True)
class Machine:
    """One kind of node, and the three constants of the model of costs.

    Args:
        gpu: a name of GPUS.
        memory: of one GPU, in bytes.
        mfu: share of a GPU's peak FLOP/s that the trainer's passes reach.
        decoding: share of memory bandwidth, or of the peak where that binds, that an engine reaches.
        logprobs: seconds of a pass for log-probs, in those of its FLOPs at the same share of the peak.
    """

    gpu: str = "H100"
    memory: int = 80 * 2**30
    gpus_per_node: int = 8
    mfu: float = 0.35
    decoding: float = 0.6
    logprobs: float = 1.0

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError("--gpu", self.gpu, f"use one of {', '.join(GPUS)}")

    @property
    def peak(self) -> float:
        return PEAKS[self.gpu]

    @property
    def rates(self) -> Gpu:
        return GPUS[self.gpu]
