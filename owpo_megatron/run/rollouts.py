"""Rollouts as plain JSON: in a run's rollouts/, where their tokens are in a file of their own, and in checkpoints
where a pool keeps some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from owpo_megatron.types import Episode, Prompt, Rollout, Span, TokenIds, TokenValues
from owpo_megatron.types.rollouts import Judgement

_TOKENS: dict[str, type[TokenIds] | type[TokenValues]] = {"response_ids": TokenIds, "behaviour_logp": TokenValues}
BYTES = 4  # of a number


def plain_rollout(rollout: Rollout, tokens: BinaryIO | None = None) -> dict[str, Any]:
    """A rollout as plain JSON; log-probs keep every bit, and what only some methods set is left out at its default.

    Args:
        tokens: gets the response's ids (int32) and log-probs (float32) appended; the JSON then has their places.
    """
    defaults = {field.name: field.default for field in fields(Rollout)}
    prompt = {name: value for name, value in vars(rollout.prompt).items() if name != "prefix" or value}
    del prompt["messages"]  # the prompt's text has them
    own = ("origin", "keeps_old", "trained_ids", "versions", "episode")
    found = {name: value for name, value in vars(rollout).items() if name not in own or value != defaults[name]}
    del found["experts"], found["verdict"]  # a hundred times the tokens; verdicts are kept beside the rollouts
    for name, kind in _TOKENS.items():
        if tokens is None:
            found[name] = list(found[name])
            continue
        numbers: Any = found[name]
        found[name] = {"at": tokens.tell(), "count": len(numbers)}
        tokens.write(bytes(numbers if isinstance(numbers, kind) else kind(numbers)))
    if rollout.episode is not None:
        found["episode"] = asdict(rollout.episode)
    return found | {"prompt": prompt}


def parse_rollout(plain: Mapping[str, Any], tokens: Path | None = None) -> Rollout:
    """Read what `plain_rollout` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is something else, or its tokens are not in the file.
    """
    found = dict(plain)
    prompt = dict(found.pop("prompt"))
    prompt["token_ids"] = tuple(prompt["token_ids"])
    for name, kind in _TOKENS.items():
        numbers = found[name]
        found[name] = kind.from_bytes(_read(tokens, **numbers)) if isinstance(numbers, Mapping) else kind(numbers)
    if found.get("trained_ids") is not None:
        found["trained_ids"] = tuple(found["trained_ids"])
    found["versions"] = tuple((version, count) for version, count in found.get("versions", ()))
    if found.get("episode") is not None:
        found["episode"] = _parse_episode(found["episode"])
    return Rollout(prompt=Prompt(**prompt), **found)


def _parse_episode(plain: Mapping[str, Any]) -> Episode:
    spans = tuple(Span(**span) for span in plain["spans"])
    judgement = plain["judgement"] and Judgement(**plain["judgement"])
    return Episode(spans, plain["ended"], judgement, plain["detail"])


def _read(tokens: Path | None, at: int, count: int) -> bytes:
    if not count:
        return b""
    if tokens is None or not tokens.is_file():
        raise ValueError(f"its tokens are missing: {tokens.name if tokens else 'no file'}")
    with open(tokens, "rb") as file:
        file.seek(at)
        content = file.read(count * BYTES)
    if len(content) < count * BYTES:
        raise ValueError(f"{tokens.name} ends before its tokens")
    return content
