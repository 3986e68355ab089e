"""Rollouts as plain JSON: in a run's rollouts/, and in checkpoints where a pool keeps some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from owpo_megatron.types import Prompt, Rollout


def plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON; log-probs keep every bit, and what only some methods set is left out at its default."""
    defaults = {field.name: field.default for field in fields(Rollout)}
    prompt = {name: value for name, value in vars(rollout.prompt).items() if name != "prefix" or value}
    own = ("origin", "keeps_old", "trained_ids")
    found = {name: value for name, value in vars(rollout).items() if name not in own or value != defaults[name]}
    return found | {"prompt": prompt}


def parse_rollout(plain: Mapping[str, Any]) -> Rollout:
    """Read what `plain_rollout` wrote. Raises KeyError, TypeError or ValueError where it is something else."""
    found = dict(plain)
    prompt = dict(found.pop("prompt"))
    prompt["token_ids"] = tuple(prompt["token_ids"])
    for name in ("response_ids", "behaviour_logp"):
        found[name] = tuple(found[name])
    if found.get("trained_ids") is not None:
        found["trained_ids"] = tuple(found["trained_ids"])
    return Rollout(prompt=Prompt(**prompt), **found)
