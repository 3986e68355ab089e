"""Rollouts as plain JSON: in a run's rollouts/, and in checkpoints where a pool keeps some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from owpo_megatron.types import Episode, Prompt, Rollout, Span
from owpo_megatron.types.rollouts import Judgement


def plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON; log-probs keep every bit, and what only some methods set is left out at its default."""
    defaults = {field.name: field.default for field in fields(Rollout)}
    prompt = {name: value for name, value in vars(rollout.prompt).items() if name != "prefix" or value}
    del prompt["messages"]  # the prompt's text has them
    own = ("origin", "keeps_old", "trained_ids", "episode")
    found = {name: value for name, value in vars(rollout).items() if name not in own or value != defaults[name]}
    if rollout.episode is not None:
        found["episode"] = asdict(rollout.episode)
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
    if found.get("episode") is not None:
        found["episode"] = _parse_episode(found["episode"])
    return Rollout(prompt=Prompt(**prompt), **found)


def _parse_episode(plain: Mapping[str, Any]) -> Episode:
    spans = tuple(Span(**span) for span in plain["spans"])
    judgement = plain["judgement"] and Judgement(**plain["judgement"])
    return Episode(spans, plain["ended"], judgement, plain["detail"])
