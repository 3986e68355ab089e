"""The maths of the methods: torch in, torch out; no process groups, no state."""

from owpo_megatron.algorithms.ablations import OwpoNoAccel, OwpoNoAsym, OwpoNoLocking
from owpo_megatron.algorithms.advantages import group_advantages
from owpo_megatron.algorithms.curriculum import num_active, top_active
from owpo_megatron.algorithms.dapo import Dapo
from owpo_megatron.algorithms.dynamics import effective_progress
from owpo_megatron.algorithms.grpo import Grpo
from owpo_megatron.algorithms.importance import TruncatedImportance
from owpo_megatron.algorithms.metrics import DELTA_BINS, DELTA_RANGE, directional_deviation
from owpo_megatron.algorithms.mopd import Mopd
from owpo_megatron.algorithms.opd import Opd
from owpo_megatron.algorithms.owpo import Owpo, token_weights
from owpo_megatron.algorithms.registry import OBJECTIVES, SAMPLE_MEAN, make_objective
from owpo_megatron.algorithms.surrogate import clipped_surrogate, k3, sample_mean_sum, token_sum
from owpo_megatron.algorithms.sym_dapo import SymDapo

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
