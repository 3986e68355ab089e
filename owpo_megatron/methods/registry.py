"""The methods by name. A new method is one small file, one line here, and its name in config/method.py."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from owpo_megatron.errors import UserError
from owpo_megatron.methods.ablations import OwpoNoAccel, OwpoNoAsym, OwpoNoLocking
from owpo_megatron.methods.dapo import Dapo
from owpo_megatron.methods.grpo import Grpo
from owpo_megatron.methods.importance import TruncatedImportance
from owpo_megatron.methods.mopd import Mopd
from owpo_megatron.methods.opd import Opd
from owpo_megatron.methods.owpo import Owpo
from owpo_megatron.methods.sym_dapo import SymDapo
from owpo_megatron.types import Objective

OBJECTIVES: dict[str, Objective] = {
    "owpo": Owpo(),
    "owpo_no_asym": OwpoNoAsym(),
    "owpo_no_locking": OwpoNoLocking(),
    "owpo_no_accel": OwpoNoAccel(),
    "dapo": Dapo(),
    "grpo": Grpo(),
    "sym_dapo": SymDapo(),
    "opd": Opd(),
    "mopd": Mopd(),
}
"""Every method with the paper's hyper-parameters, ready to be called."""
SAMPLE_MEAN = ("grpo", "opd", "mopd")
"""Methods whose loss is a mean over a sample's tokens, then over samples; the others' is a mean over all tokens."""


def make_objective(name: str, tis_cap: float | None = None, **overrides: float) -> Objective:
    """The method `name` with some hyper-parameters changed.

    Args:
        tis_cap: correct for the engine by truncated importance sampling with this cap; None: do not.

    Raises:
        UserError: there is no such method, or it has no such hyper-parameter.

    Example:
        >>> make_objective("owpo", weight_high=1.5)
        Owpo(clip_low=0.2, clip_high=0.28, weight_low=0.8, weight_high=1.5)
    """
    if name not in OBJECTIVES:
        raise UserError("algorithm.name", name, f"use one of {', '.join(OBJECTIVES)}")
    objective = cast(Any, OBJECTIVES[name])
    known = [field.name for field in dataclasses.fields(objective)]
    for field, value in overrides.items():
        if field not in known:
            raise UserError(f"algorithm.{field}", value, f"{name} has no {field}; it has {', '.join(known)}")
    changed = dataclasses.replace(objective, **overrides)
    return changed if tis_cap is None else TruncatedImportance(changed, tis_cap)
