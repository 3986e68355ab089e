"""Where problems come from: a generated task, a JSON-lines or Parquet file, or a data set of the hub.

What a record looks like is in records.py, which problems are left out and why in faults.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from owpo_megatron.config import DataConfig
from owpo_megatron.data import hub
from owpo_megatron.data.contamination import Contamination
from owpo_megatron.data.faults import fold, leave_out
from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.records import jsonl_records, parquet_records, problem_of
from owpo_megatron.data.tasks import get_task
from owpo_megatron.data.templates import apply_template
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

LEFT_OUT = ("repeated", "contradictory")  # by default


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's records.

    Example:
        SourceReport(source="dapo.jsonl", read=17895, repeated=980, contradictory=30, too_long=12, used=16873,
                     contradictory_ids=("dapo-00035", "dapo-00179"))
    """

    source: str
    read: int  # records in the source
    repeated: int = 0  # left out: the same problem with the same answer came before
    contradictory: int = 0  # left out: the problem also stands there with another answer
    lookalike: int = 0  # left out: one with the same letters and digits has another answer
    long_answer: int = 0  # left out: an integer of more than 15 digits
    contaminated: int = 0  # left out: stands in an evaluation set
    too_long: int = 0  # left out: more tokens than data.max_prompt_tokens
    used: int = 0  # after all that and data.limit
    contradictory_ids: tuple[str, ...] = ()  # the first few

    def __str__(self) -> str:
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.repeated, "repeated"),
                (self.contradictory, "with contradictory answers"),
                (self.lookalike, "alike with contradictory answers"),
                (self.long_answer, "with answers of over 15 digits"),
                (self.contaminated, "of evaluation sets"),
                (self.too_long, "too long"),
            )
            if count
        ]
        return f"{self.source}: {self.used} of {self.read} problems" + (
            f" (left out: {', '.join(left_out)})" if left_out else ""
        )


def load_prompts(
    config: DataConfig, tokenizer: Tokenizer, split: Split = "train", limit: int | None = None
) -> tuple[list[Prompt], SourceReport]:
    """Prompts of a run: training ones from `data.source`, test ones from `data.eval_source` or the task's own split.

    Args:
        limit: of the test split (`eval.limit`); the train split has `data.limit`.

    Raises:
        UserError: the source cannot be read, a record is faulty, there is no test split, or nothing is left.
    """
    source = config.source if split == "train" else config.eval_source or config.source
    if split == "test" and config.eval_source is None and not config.source.startswith("task:"):
        raise UserError(
            "data.eval_source",
            None,
            f"{config.source} has no test split; name a held-out file, or set eval.before, eval.after and eval.every "
            "to false, false and 0",
        )
    if split == "train":
        problems, report = load_problems(
            source, split, leaving_out=config.leave_out, against=config.against, overlap=config.overlap
        )
    else:
        problems, report = load_problems(source, split)
    limit = config.limit if split == "train" else limit
    prompts: list[Prompt] = []
    too_long = 0
    for problem in problems:
        if limit is not None and len(prompts) == limit:
            break
        text = apply_template(config.template, problem.text, tokenizer)
        token_ids = tokenizer.encode(text)
        if len(token_ids) > config.max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(Prompt(problem.id, token_ids, text, problem.answer, problem.domain))
    if not prompts:
        raise UserError(
            "data.max_prompt_tokens", config.max_prompt_tokens, f"no prompt of {source} is that short; raise it"
        )
    return prompts, replace(report, too_long=too_long, used=len(prompts))


def load_problems(
    source: str,
    split: Split = "train",
    limit: int | None = None,
    leaving_out: Collection[str] = LEFT_OUT,
    against: Sequence[str] = (),
    overlap: float = 0.8,
) -> tuple[list[Problem], SourceReport]:
    """The first `limit` problems of a source, in its order, without those of the kinds `leaving_out`.

    Args:
        source: `task:NAME`, `hub:OWNER/NAME...`, or the path of a .jsonl or .parquet file (the last two are one split,
            whatever `split` says).
        leaving_out: see `data.leave_out`. Contradictory problems go altogether: no response to one can be called right.
        against, overlap: evaluation sets, and the shared part that counts, for `contaminated`.

    Raises:
        UserError: an unknown source or task, a missing or unreadable file, or a faulty record (named file:line).
    """
    if source.startswith("task:"):
        problems = get_task(source.removeprefix("task:")).problems(split)[:limit]
        return problems, SourceReport(source, read=len(problems), used=len(problems))
    index = None
    if "contaminated" in leaving_out:
        index = Contamination((problem for name in against for problem in read_problems(name, "data.against")), overlap)
    if "repeated" in leaving_out:
        folded = fold(read_problems(source))
        problems, report = list(folded.problems), SourceReport(source, folded.read, folded.repeated)
    else:
        problems = list(read_problems(source))
        report = SourceReport(source, len(problems))
    kept, out = leave_out(tuple(problems), leaving_out, index)
    if not report.read:
        raise UserError("data.source", source, "holds no records")
    if not kept:
        raise UserError("data.leave_out", list(leaving_out), f"leaves nothing of {source}; see `owpo data check`")
    return kept[:limit], replace(
        report,
        contradictory=len(out.get("contradictory", ())),
        lookalike=len(out.get("lookalike", ())),
        long_answer=len(out.get("long_answer", ())),
        contaminated=len(out.get("contaminated", ())),
        used=len(kept[:limit]),
        contradictory_ids=tuple(out.get("contradictory", ())[:10]),
    )


def read_problems(source: str, field: str = "data.source") -> Iterator[Problem]:
    """Every problem of a source, faulty ones included, one at a time.

    Raises:
        UserError: as for `load_problems`; `field` is named where the source itself is at fault.
    """
    if source.startswith("task:"):
        yield from get_task(source.removeprefix("task:")).problems("train")
        return
    index = 0
    for path in source_files(source, field):
        for place, record in jsonl_records(path) if path.suffix == ".jsonl" else parquet_records(path):
            yield problem_of(record, place, index)
            index += 1


def source_files(source: str, field: str = "data.source") -> list[Path]:
    """The files of a source that is not a task; those of the hub are downloaded.

    Raises:
        UserError: an unknown kind of source, no such file, or the hub's troubles (hub.py).
    """
    if source.startswith(hub.PREFIX):
        return hub.hub_files(source, field)
    path = Path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(field, source, "give `task:NAME`, a .jsonl file, a .parquet file or `hub:OWNER/NAME`")
    if not path.is_file():
        raise UserError(field, source, "is a folder; name a file in it" if path.is_dir() else "no such file")
    return [path]


def check_source(source: str, field: str = "data.source") -> None:
    """Read a source's first record before a run starts, which downloads a set of the hub.

    Raises:
        UserError: as for `read_problems`, there is no such task, or it holds no records.
    """
    if source.startswith("task:"):
        get_task(source.removeprefix("task:"))
    elif next(read_problems(source, field), None) is None:
        raise UserError(field, source, "holds no records")
