"""The maths of the methods: torch in, torch out; no process groups, no state."""

from owpo_megatron.methods.ablations import OwpoNoAccel, OwpoNoAsym, OwpoNoLocking
from owpo_megatron.methods.advantages import group_advantages
from owpo_megatron.methods.curriculum import num_active, top_active
from owpo_megatron.methods.dapo import Dapo
from owpo_megatron.methods.dynamics import effective_progress
from owpo_megatron.methods.grpo import Grpo
from owpo_megatron.methods.importance import TruncatedImportance
from owpo_megatron.methods.metrics import DELTA_BINS, DELTA_RANGE, directional_deviation
from owpo_megatron.methods.mopd import Mopd
from owpo_megatron.methods.opd import Opd
from owpo_megatron.methods.owpo import Owpo, token_weights
from owpo_megatron.methods.registry import OBJECTIVES, SAMPLE_MEAN, make_objective
from owpo_megatron.methods.surrogate import clipped_surrogate, k3, sample_mean_sum, token_sum
from owpo_megatron.methods.sym_dapo import SymDapo

__all__ = [
    "DELTA_BINS",
    "DELTA_RANGE",
    "OBJECTIVES",
    "SAMPLE_MEAN",
    "Dapo",
    "Grpo",
    "Mopd",
    "Opd",
    "Owpo",
    "OwpoNoAccel",
    "OwpoNoAsym",
    "OwpoNoLocking",
    "SymDapo",
    "TruncatedImportance",
    "clipped_surrogate",
    "directional_deviation",
    "effective_progress",
    "group_advantages",
    "k3",
    "make_objective",
    "num_active",
    "sample_mean_sum",
    "token_sum",
    "token_weights",
    "top_active",
]
