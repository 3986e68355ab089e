"""The methods, one file each, and what they are made of. Nothing here imports torch before it computes."""

from owpo_megatron.methods.catalogue import catalogue, find_method, make_method, register
from owpo_megatron.methods.check import check_coupling
from owpo_megatron.methods.curriculum import num_active, top_active
from owpo_megatron.methods.dynamics import effective_progress
from owpo_megatron.methods.hyper import Hyper, hyper, hyper_parameters
from owpo_megatron.methods.loss import Loss, MethodLoss, dense_loss
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, StepView, Terms, Turn, turns_of
from owpo_megatron.methods.metrics import DELTA_BINS, DELTA_RANGE, directional_deviation
from owpo_megatron.methods.normalise import group_advantages
from owpo_megatron.methods.paper.ablations import OwpoNoAccel, OwpoNoAsym, OwpoNoLocking
from owpo_megatron.methods.paper.mopd import Mopd
from owpo_megatron.methods.paper.opd import Opd
from owpo_megatron.methods.paper.owpo import Owpo, token_weights
from owpo_megatron.methods.paper.sym_dapo import SymDapo
from owpo_megatron.methods.plan import Ask, PlanView, Solutions, TokenStatistics
from owpo_megatron.methods.prepare import linear_terms, slopes
from owpo_megatron.methods.surrogate import clipped_ratio, clipped_surrogate, k3
from owpo_megatron.methods.token.dapo import Dapo
from owpo_megatron.methods.token.grpo import Grpo

__all__ = [
    "DELTA_BINS",
    "DELTA_RANGE",
    "Ask",
    "ChunkBatch",
    "Dapo",
    "Grpo",
    "Hyper",
    "Loss",
    "Method",
    "MethodLoss",
    "Mopd",
    "Opd",
    "Owpo",
    "OwpoNoAccel",
    "OwpoNoAsym",
    "OwpoNoLocking",
    "PlanView",
    "SampleView",
    "Solutions",
    "StepView",
    "SymDapo",
    "Terms",
    "TokenStatistics",
    "Turn",
    "catalogue",
    "check_coupling",
    "clipped_ratio",
    "clipped_surrogate",
    "dense_loss",
    "directional_deviation",
    "effective_progress",
    "find_method",
    "group_advantages",
    "hyper",
    "hyper_parameters",
    "k3",
    "linear_terms",
    "make_method",
    "num_active",
    "register",
    "slopes",
    "token_weights",
    "top_active",
    "turns_of",
]
