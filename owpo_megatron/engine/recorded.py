"""Rollouts on disk, one JSON object per line and one file per step, and an engine that replays them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.run.files import whole_file
from owpo_megatron.run.layout import files_by_step, step_name
from owpo_megatron.run.rollouts import parse_rollout, plain_rollout
from owpo_megatron.types import Finished, Progress, Rollout, SampleRequest, Sampling


def rollouts_path(folder: Path, step: int) -> Path:
    """Return the file of a step.

    Example:
        >>> rollouts_path(Path("runs/a/rollouts"), 12).name
        'step_000012.jsonl'
    """
    return folder / f"{step_name(step)}.jsonl"


def save_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Write a file atomically; log-probs keep every bit."""
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(plain_rollout(rollout), ensure_ascii=False) + "\n")


def load_rollouts(path: Path) -> list[Rollout]:
    """Read a file written by `save_rollouts`.

    Raises:
        UserError: a line is not a rollout.
    """
    with open(path, "rb") as file:
        return [_parse(line, f"{path}:{number}") for number, line in enumerate(file, 1)]


def _parse(line: bytes, where: str) -> Rollout:
    try:
        return parse_rollout(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(where, line[:60].decode(errors="replace"), f"not a saved rollout ({error})") from error


class RecordedEngine:
    """RolloutEngine that returns saved rollouts, looked up by prompt id and seed.

    Args:
        folder: step_*.jsonl files of a run. They are indexed once; responses are read on demand.

    Raises:
        UserError: the folder contains no rollouts.
    """

    def __init__(self, folder: Path):
        self._index: dict[tuple[str, int], tuple[Path, int]] = {}
        for path in files_by_step(folder, ".jsonl"):
            with open(path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    rollout = _parse(line, f"{path}:{number}")
                    self._index[rollout.prompt.id, rollout.seed] = (path, offset)
                    offset += len(line)
        if not self._index:
            raise UserError("rollout.replay", folder, "no step_*.jsonl there; name the rollouts/ folder of a run")
        self._folder = folder

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """Return the saved response to each request; `sampling` is ignored, the recorded run's applies.

        Raises:
            EngineError: a request was not recorded, or was recorded with other prompt tokens.
        """
        rollouts = []
        for done, request in enumerate(requests, 1):
            rollouts.append(self._read(request))
            if finished is not None:
                finished(done - 1, rollouts[-1:])
            if progress is not None:
                progress(done, len(requests))
        return rollouts

    def _read(self, request: SampleRequest) -> Rollout:
        found = self._index.get((request.prompt.id, request.seed))
        if found is None:
            raise EngineError(
                f"{self._folder} has no rollout of prompt {request.prompt.id} with seed {request.seed}: replay needs "
                "the recorded run's data, seed and rollout sizes"
            )
        path, offset = found
        with open(path, "rb") as file:
            file.seek(offset)
            rollout = _parse(file.readline(), str(path))
        if rollout.episode is None and rollout.prompt.token_ids != request.prompt.token_ids:
            raise EngineError(
                f"prompt {request.prompt.id} has other tokens than in {path}: replay needs the recorded run's "
                "tokenizer and template"
            )
        return rollout

    def weight_versions(self) -> list[int]:
        """Return an empty list: a replay serves no weights."""
        return []

    def close(self) -> None:
        pass
