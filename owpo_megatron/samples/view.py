"""Samples as people read them: texts, verdicts, and tokens with the number that colours them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owpo_megatron.config import AlgorithmConfig
from owpo_megatron.engine import load_rollouts, rollouts_path
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import RunFolder, files_by_step, step_of
from owpo_megatron.samples.record import SampleRow, read_rows
from owpo_megatron.types import Rollout

Color = Literal["w", "ratio", "logp"]
CONTEXT = 8  # tokens before one that its text may depend on: pieces of one character, leading spaces


@dataclass(frozen=True)
class ShownToken:
    text: str
    value: float | None  # of the colour asked for; None: not recorded
    turn: int = 1  # of an episode
    observed: bool = False  # shown to the policy after that turn


@dataclass(frozen=True)
class ShownSample:
    """One rollout, ready to show."""

    step: int
    prompt_id: str
    domain: str
    sibling: int  # place among the samples of its prompt, from 1
    siblings: int
    prompt: str
    answer: str
    response: str
    tokens: tuple[ShownToken, ...]
    color: Color | None  # what the tokens' values are; None: nothing was recorded
    finish: str
    row: SampleRow | None  # None: a run before rows were recorded

    @property
    def verdict(self) -> str:
        """ "right", "wrong (no_answer)", or "ungraded"."""
        if self.row is None:
            return "ungraded"
        return "right" if self.row.correct else f"wrong ({self.row.reason})"


def recorded_steps(run: RunFolder) -> list[int]:
    """Steps whose rollouts are on disk.

    Raises:
        UserError: there are none.
    """
    steps = [step_of(file.stem) for file in files_by_step(run.rollouts, ".jsonl")]
    if not steps:
        raise UserError("run folder", run.path, "has no rollouts/; samples are there after a step with rollout.save")
    return steps


def view_samples(
    run: RunFolder,
    step: int,
    decode: Callable[[Sequence[int]], str],
    algorithm: AlgorithmConfig,
    wanted: Callable[[Rollout, SampleRow | None], bool] = lambda rollout, row: True,
    color: Color | None = None,
    limit: int | None = None,
) -> list[ShownSample]:
    """Samples of a step, in the order in which they were drawn.

    Args:
        decode: token ids to text.
        algorithm: the run's section; its method and bounds give w.
        wanted: which rollouts to show.
        color: None: w where it is recorded and the method has one, else the log-ratio to the reference, else the
            engine's log-prob.
        limit: at most so many.

    Raises:
        UserError: the step was not recorded, or a line of it is not a rollout.
    """
    path = rollouts_path(run.rollouts, step)
    if not path.is_file():
        known = recorded_steps(run)
        raise UserError("--step", step, f"not recorded; {run.path} has steps {known[0]} to {known[-1]}")
    rollouts = load_rollouts(path)
    rows = {(row.prompt_id, row.seed): row for row in read_rows(run.samples, step)}
    places = _places(rollouts)
    views: list[ShownSample] = []
    for index, rollout in enumerate(rollouts):
        row = rows.get((rollout.prompt.id, rollout.seed))
        if not wanted(rollout, row):
            continue
        if limit is not None and len(views) == limit:
            break
        shown, values = token_values(rollout, row, algorithm, color)
        turns = token_turns(rollout)
        pieces = token_texts(rollout.response_ids, decode)
        views.append(
            ShownSample(
                step,
                rollout.prompt.id,
                rollout.prompt.domain,
                *places[index],
                rollout.prompt.text,
                rollout.prompt.answer,
                decode(rollout.response_ids),
                tuple(
                    ShownToken(text, None if observed else value, turn, observed)
                    for text, value, (turn, observed) in zip(pieces, values, turns, strict=True)
                ),
                shown,
                rollout.finish_reason,
                row,
            )
        )
    return views


def token_turns(rollout: Rollout) -> list[tuple[int, bool]]:
    """(turn, whether it was shown to the policy after that turn) of every token of the response."""
    if rollout.episode is None:
        return [(1, False)] * len(rollout.response_ids)
    found, turn = [], 0
    for span in rollout.episode.spans:
        turn += span.generated
        found += [(turn, not span.generated)] * span.length
    return found


def token_values(
    rollout: Rollout, row: SampleRow | None, algorithm: AlgorithmConfig, color: Color | None
) -> tuple[Color | None, list[float | None]]:
    """(what the values are, one per token of the response)."""
    length = len(rollout.response_ids)
    ratio = _log_ratio(rollout, row)
    if color in (None, "w") and row is not None:
        weights = _weights(ratio, length, row, algorithm)
        if weights is not None:
            return "w", list(weights)
    if color in (None, "ratio") and ratio is not None:
        return "ratio", list(ratio)
    if color in (None, "logp"):
        return "logp", list(rollout.behaviour_logp)
    return None, [None] * length


def _log_ratio(rollout: Rollout, row: SampleRow | None) -> list[float] | None:
    """Policy over reference at the step's start; with one update per step the policy's log-probs are the engine's."""
    if row is None:
        return None
    if row.ref_is_old:
        return [0.0] * len(rollout.response_ids)
    if row.ref_logp is None:
        return None
    old = row.old_logp if row.old_logp is not None else rollout.behaviour_logp
    return [ours - theirs for ours, theirs in zip(old, row.ref_logp, strict=True)]


def _weights(
    ratio: Sequence[float] | None, length: int, row: SampleRow, algorithm: AlgorithmConfig
) -> list[float] | None:
    """The method's w of every token at the step's start, exactly 1 for a sample that is not reweighted; None: the
    method has none, or it was not recorded."""
    import torch

    from owpo_megatron.methods import make_method

    method = make_method(algorithm)
    log_weight = getattr(method, "log_weight", None)
    if log_weight is None or row.advantage is None:
        return None
    if not row.active:
        return [1.0] * length
    if ratio is None:
        return None
    sign = math.copysign(1.0, row.advantage) if row.advantage else 0.0
    delta_T = sign * torch.tensor(ratio, dtype=torch.float64)
    bounds = (method.weight_low, method.weight_high)  # type: ignore[attr-defined]
    return log_weight(delta_T).exp().clamp(*bounds).tolist()


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; tokens of one character show it with the last of them.

    Special tokens add none, so that the texts joined are the response.
    """
    texts: list[str] = []
    for index in range(len(ids)):
        start = max(0, index - CONTEXT)
        before, after = decode(ids[start:index]), decode(ids[start : index + 1])
        while before.endswith("\ufffd"):  # a character whose bytes are not complete yet
            before = before[:-1]
        complete = after if index == len(ids) - 1 else after.rstrip("\ufffd")
        texts.append(complete[len(before) :])
    return texts


def _places(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    """(sibling, siblings) of every rollout: those of one prompt follow each other."""
    sizes: dict[str, int] = {}
    order = []
    for rollout in rollouts:
        sizes[rollout.prompt.id] = sizes.get(rollout.prompt.id, 0) + 1
        order.append(sizes[rollout.prompt.id])
    return [(place, sizes[rollout.prompt.id]) for place, rollout in zip(order, rollouts, strict=True)]


def tokenizer_folder(run: RunFolder, model: Path) -> Path:
    """The folder whose tokenizer decodes a run's samples: the model's, else that of a checkpoint.

    Raises:
        UserError: neither is there.
    """
    from owpo_megatron.config import HF_FILES

    candidates = [model, model / HF_FILES, run.hf, *sorted(run.checkpoints.glob(f"step_*/{HF_FILES}"), reverse=True)]
    for folder in candidates:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            return folder
    raise UserError("model.path", model, "no tokenizer there, and none in a checkpoint of the run; restore the folder")
