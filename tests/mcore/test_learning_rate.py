"""The learning rate of every update, against formulae written here; and that Muon is still what it is refused for."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.mcore.optimizer import make_scheduler

LR, MIN, WARMUP, STEPS, UPDATES = 1e-3, 1e-4, 4, 6, 4
TOTAL = STEPS * UPDATES


def config(**optimizer: Any) -> Config:
    raw = {"steps": STEPS, "updates_per_step": UPDATES, "lr": LR, "warmup_steps": WARMUP} | optimizer
    return Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}, "optimizer": raw})


def rates(**optimizer: Any) -> list[float]:
    """Rates of updates 1, 2, ..., as the policy steps the scheduler; the group has the keys that megatron gives it."""
    settings = config(**optimizer).optimizer
    group = {"lr": 0.0, "weight_decay": 0.0, "max_lr": settings.lr, "min_lr": settings.min_lr}
    scheduler = make_scheduler(SimpleNamespace(param_groups=[group]), settings)  # type: ignore[arg-type]
    out = []
    for _ in range(TOTAL):
        scheduler.step(1)
        out.append(float(group["lr"]))
    return out


def by_hand(update: int, schedule: str, decay_updates: int = 0) -> float:
    if update <= WARMUP:
        return LR * update / WARMUP
    done = (update - WARMUP) / (TOTAL - WARMUP)
    if schedule == "cosine":
        return MIN + (LR - MIN) * (1 + math.cos(math.pi * done)) / 2
    if schedule == "linear":
        return LR - (LR - MIN) * done
    if schedule == "wsd":
        into = max(0, update - (TOTAL - decay_updates))
        return LR - (LR - MIN) * into / decay_updates
    return LR


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_every_update_has_the_rate_of_the_formula(schedule: str) -> None:
    more: dict[str, Any] = {} if schedule == "constant" else {"min_lr": MIN}
    if schedule == "wsd":
        more["decay_steps"] = 2
    found = rates(lr_schedule=schedule, **more)
    wanted = [by_hand(update, schedule, 2 * UPDATES) for update in range(1, TOTAL + 1)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found[-1] == pytest.approx(LR if schedule == "constant" else MIN)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lr_schedule": "wsd"}, "optimizer.decay_steps"),
        ({"lr_schedule": "cosine", "decay_steps": 2}, "optimizer.decay_steps"),
        ({"lr_schedule": "wsd", "decay_steps": STEPS + 1}, "optimizer.decay_steps"),
        ({"lr_schedule": "cosine", "min_lr": 1.0}, "optimizer.min_lr"),
        ({"min_lr": MIN}, "optimizer.min_lr"),
        ({"moments": "bfloat16", "beta2": 0.999}, "optimizer.beta2"),
        ({"moments": "bfloat16", "beta1": 0.995}, "optimizer.beta1"),
        ({"lr_schedule": "linear", "warmup_steps": TOTAL}, "optimizer.warmup_steps"),
        ({"name": "muon"}, "optimizer.name"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        config(**fields)
    assert caught.value.field == field


def test_muon_still_refuses_the_distributed_optimizer() -> None:
    """Once megatron-core lifts this, the refusal of `optimizer.name: muon` is to be looked at again."""
    from megatron.core.optimizer import muon

    assert "muon with dist optimizer is not supported" in inspect.getsource(muon.get_megatron_muon_optimizer)
