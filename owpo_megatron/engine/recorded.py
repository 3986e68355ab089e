"""Rollouts on disk, and an engine that replays them.

A step has two files: step_N.jsonl with a line per rollout, and step_N.tokens with the ids and log-probs of all
responses, 4 bytes each. A line may also have its own inside, as those of earlier versions do.
"""

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


def tokens_path(path: Path) -> Path:
    """Return the file with the tokens of a file of lines."""
    return path.with_suffix(".tokens")


def save_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Write both files of a step; the lines come last, in one go. Log-probs are float32, and keep every bit of it."""
    with whole_file(path) as lines, whole_file(tokens_path(path)) as blocks:
        with open(lines, "w", encoding="utf-8") as file, open(blocks, "wb") as tokens:
            for rollout in rollouts:
                file.write(json.dumps(plain_rollout(rollout, tokens), ensure_ascii=False) + "\n")
        path.unlink(missing_ok=True)  # lines of an earlier save never meet the tokens of this one


def load_rollouts(path: Path) -> list[Rollout]:
    """Read a step that `save_rollouts` wrote, by its file of lines.

    Raises:
        UserError: a line is not a rollout, or its tokens are missing.
    """
    with open(path, "rb") as file:
        return [_parse(line, path, f"{path}:{number}") for number, line in enumerate(file, 1)]


def _parse(line: bytes, path: Path, where: str) -> Rollout:
    try:
        return parse_rollout(json.loads(line), tokens_path(path))
    except (ValueError, KeyError, TypeError) as error:
        raise _not_saved(line, where, error) from error


def _key(line: bytes, where: str) -> tuple[str, int]:
    """(prompt id, seed) of a line."""
    try:
        plain = json.loads(line)
        return plain["prompt"]["id"], plain["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise _not_saved(line, where, error) from error


def _not_saved(line: bytes, where: str, error: Exception) -> UserError:
    return UserError(where, line[:60].decode(errors="replace"), f"not a saved rollout ({error})")


class RecordedEngine:
    """RolloutEngine that returns saved rollouts, looked up by prompt id and seed.

    Sessions of agents (environments/sessions.py) have no seed: the siblings of a prompt get its sessions in order.

    Args:
        folder: step_*.jsonl files of a run. They are indexed once; responses are read on demand.

    Raises:
        UserError: the folder contains no rollouts.
    """

    def __init__(self, folder: Path):
        self._index: dict[tuple[str, int], tuple[Path, int]] = {}
        self._sessions: dict[str, list[tuple[Path, int]]] = {}
        for path in files_by_step(folder, ".jsonl"):
            with open(path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    name, seed = _key(line, f"{path}:{number}")
                    if seed < 0:
                        self._sessions.setdefault(name, []).append((path, offset))
                    else:
                        self._index[name, seed] = (path, offset)
                    offset += len(line)
        if not self._index and not self._sessions:
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
        rollouts: list[Rollout] = []
        siblings: dict[str, int] = {}
        for done, request in enumerate(requests, 1):
            place = siblings.setdefault(request.prompt.id, 0)
            siblings[request.prompt.id] += 1
            rollouts.append(self._read(request, place))
            if finished is not None:
                finished(done - 1, rollouts[-1:])
            if progress is not None:
                progress(done, len(requests))
        return rollouts

    def _read(self, request: SampleRequest, sibling: int) -> Rollout:
        found, sessions = self._index.get((request.prompt.id, request.seed)), self._sessions.get(request.prompt.id, ())
        if found is None and sessions and sibling >= len(sessions):
            raise EngineError(
                f"{self._folder} has {len(sessions)} sessions of problem {request.prompt.id}, and a group wants more: "
                f"set rollout.group_size to at most {len(sessions)}, or record more"
            )
        if found is None and sessions:
            found = sessions[sibling]
        if found is None:
            raise EngineError(
                f"{self._folder} has no rollout of prompt {request.prompt.id} with seed {request.seed}: replay needs "
                "the recorded run's data, seed and rollout sizes"
            )
        path, offset = found
        with open(path, "rb") as file:
            file.seek(offset)
            rollout = _parse(file.readline(), path, str(path))
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
