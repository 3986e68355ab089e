"""Results of one set on disk: each sample is drawn and graded once, whatever interrupts the evaluation.

FOLDER/
    NAME.part.jsonl   during the evaluation: one line per graded sample, after a first line with the settings
    NAME.jsonl        at the end: one line per problem {id, answer, correct, verdicts, lengths, responses}
                      and chains, the verdicts on the reasoning of right responses
    NAME.json         the scores with their intervals and settings
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.files import write_whole
from owpo_megatron.types import Ids, Prompt, VerdictReason


@dataclass(frozen=True)
class Draw:
    """One graded response.

    Example:
        Draw("ok", length=212, truncated=False, response_ids=(11, 3, 1))
    """

    reason: VerdictReason
    length: int  # tokens
    truncated: bool  # reached the token limit
    response_ids: Ids | None  # None if responses are not kept
    chain: VerdictReason | None = None  # of its reasoning; None: nobody asked


class Results:
    """Samples drawn from one set; each is on disk from the moment it is graded.

    Args:
        identity: what determines the results (`draw.identity`). Existing results of another identity are refused.
        keep_responses: store response ids too.
        fresh: delete existing results first.

    Raises:
        UserError: the folder contains results of another evaluation.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], keep_responses: bool, fresh: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.scores_file = folder / f"{name}.json"
        self.problems_file = folder / f"{name}.jsonl"
        self._part = folder / f"{name}.part.jsonl"
        self._identity = json.loads(json.dumps(identity))
        self._keep_responses = keep_responses
        self._draws: dict[tuple[int, int], Draw] = {}
        self.right = 0
        if fresh:
            for file in (self.scores_file, self.problems_file, self._part):
                file.unlink(missing_ok=True)
        self.scores = self._finished()
        if self.scores is None:
            self._open_part()

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether the sample (problem, sibling) has been drawn."""
        return place in self._draws

    def __len__(self) -> int:
        """Number of samples drawn, of which `right` are right."""
        return len(self._draws)

    def add(self, problem: int, sibling: int, draw: Draw) -> None:
        """Store one graded sample."""
        assert (problem, sibling) not in self._draws, "a sample is drawn once"
        line = {"at": [problem, sibling], "reason": draw.reason, "length": draw.length, "truncated": draw.truncated}
        if draw.chain is not None:
            line["chain"] = draw.chain
        if self._keep_responses:
            line["ids"] = list(draw.response_ids or ())
        else:
            draw = replace(draw, response_ids=None)
        with self._part.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(problem, sibling, draw)

    def discard(self, reasons: Collection[str]) -> None:
        """Forget the samples with these verdicts, of answer or reasoning, so that a later call draws them again."""
        lines = self._part.read_text().splitlines(keepends=True)

        def stays(reason: str, chain: str | None) -> bool:
            return not {reason, chain} & {*reasons}

        told = [(text, json.loads(text)) for text in lines[1:]]
        kept = [text for text, line in told if stays(line["reason"], line.get("chain"))]
        write_whole(self._part, "".join(lines[:1] + kept))
        self._draws = {place: draw for place, draw in self._draws.items() if stays(draw.reason, draw.chain)}

    def draws(self, problems: int, samples: int) -> list[list[Draw]]:
        """Return all samples by problem, once all have been drawn."""
        return [[self._draws[problem, sibling] for sibling in range(samples)] for problem in range(problems)]

    def finish(self, prompts: Sequence[Prompt], samples: int, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Write the two final files atomically; return the content of the scores file."""
        lines, judged = [], any(draw.chain is not None for draw in self._draws.values())
        for prompt, draws in zip(prompts, self.draws(len(prompts), samples), strict=True):
            line: dict[str, Any] = {
                "id": prompt.id,
                "answer": prompt.answer,
                "correct": sum(draw.reason == "ok" for draw in draws),
                "verdicts": [draw.reason for draw in draws],
                "lengths": [draw.length for draw in draws],
            }
            if judged:
                line["chains"] = [draw.chain for draw in draws]
            if self._keep_responses:
                line["responses"] = [list(draw.response_ids or ()) for draw in draws]
            lines.append(json.dumps(line) + "\n")
        write_whole(self.problems_file, "".join(lines))
        self.scores = {**scores, "settings": self._identity}
        write_whole(self.scores_file, json.dumps(self.scores, indent=1) + "\n")
        self._part.unlink(missing_ok=True)  # another command with the same settings may have been as fast
        return self.scores

    def _finished(self) -> dict[str, Any] | None:
        if not self.scores_file.is_file():
            return None
        try:
            scores = json.loads(self.scores_file.read_text(errors="replace"))
            settings = dict(scores["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self.scores_file) from error
        self._check(self.scores_file, settings)
        return scores

    def _open_part(self) -> None:
        lines = self._part.read_bytes().splitlines(keepends=True) if self._part.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # incomplete line of a killed process
        if len(lines) < 2:  # no sample yet: start over, whatever its settings
            write_whole(self._part, json.dumps({"settings": self._identity}) + "\n")
            return
        try:
            settings = dict(json.loads(lines[0])["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self._part) from error
        self._check(self._part, settings)
        whole = []
        for text in lines[1:]:
            try:
                line = json.loads(text)
                ids = tuple(line["ids"]) if "ids" in line else None
                problem, sibling = line["at"]
                draw = Draw(line["reason"], line["length"], line["truncated"], ids, line.get("chain"))
            except (ValueError, KeyError, TypeError):
                continue  # what a disk made of a line; its sample is drawn again
            if (problem, sibling) not in self:  # two commands at once draw the same samples
                self._take(problem, sibling, draw)
                whole.append(text)
        write_whole(self._part, b"".join(lines[:1] + whole))

    def _damaged(self, file: Path) -> UserError:
        return UserError("results", file, "is cut short or overwritten; give --fresh to draw anew, or another --out")

    def _take(self, problem: int, sibling: int, draw: Draw) -> None:
        self._draws[problem, sibling] = draw
        self.right += draw.reason == "ok"

    def _check(self, file: Path, found: Mapping[str, Any]) -> None:
        if found == self._identity:
            return
        names = [name for name in self._identity if found.get(name) != self._identity[name]]
        changes = ", ".join(f"{name} {found.get(name)} there, {self._identity[name]} now" for name in names)
        raise UserError(
            "results", file, f"belong to another evaluation ({changes}); give another --out, or --fresh to replace them"
        )


def date_of(folder: Path) -> datetime.date | None:
    """Return the date that the prompts of earlier results in a folder were made with, None where there is none."""
    for file in sorted(folder.glob("*.part.jsonl")) + sorted(folder.glob("*.json")):
        with file.open() as lines:
            text = lines.readline() if file.suffix == ".jsonl" else lines.read()
        try:
            settings = json.loads(text).get("settings", {})
        except (ValueError, AttributeError):
            continue  # another file, or one that a killed process was writing
        if isinstance(settings, dict) and settings.get("date"):
            return datetime.date.fromisoformat(settings["date"])
    return None
