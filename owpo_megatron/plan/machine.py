"""GPUs and links of an imagined cluster, and what of their data sheets is reached."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.errors import UserError
from owpo_megatron.run.speed import PEAKS

# Memory bandwidth of one GPU, and one direction of its link inside a node and of its share of the network, in byte/s,
# from its vendor's data sheets: NVLink, and a network card of 400 Gbit/s (A100: 200) for each GPU.
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "H20": 4.0e12, "A100": 2.04e12}
NVLINK = {"H200": 450e9, "H100": 450e9, "H20": 450e9, "A100": 300e9}
NETWORK = {"H200": 50e9, "H100": 50e9, "H20": 50e9, "A100": 25e9}


@dataclass(frozen=True)
class Machine:
    """One kind of node, and the three constants of the model of costs.

    Args:
        gpu: a name that PEAKS and BANDWIDTHS have.
        memory: of one GPU, in bytes.
        mfu: share of a GPU's peak FLOP/s that the trainer's passes reach.
        decoding: share of memory bandwidth, or of the peak where that binds, that an engine reaches.
        fixed: seconds of a step that nothing here explains (verification, loading weights, waking engines).
    """

    gpu: str = "H100"
    memory: int = 80 * 2**30
    gpus_per_node: int = 8
    mfu: float = 0.35
    decoding: float = 0.6
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if self.gpu not in BANDWIDTHS:
            raise UserError("--gpu", self.gpu, f"use one of {', '.join(BANDWIDTHS)}")

    @property
    def peak(self) -> float:
        return PEAKS[self.gpu]

    @property
    def bandwidth(self) -> float:
        return BANDWIDTHS[self.gpu]

    @property
    def nvlink(self) -> float:
        return NVLINK[self.gpu]

    @property
    def network(self) -> float:
        return NETWORK[self.gpu]
