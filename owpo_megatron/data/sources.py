"""Sources of problems: a generated task, a file, a data set of the hub, or several of them.

What a file looks like is in files.py, a record in records.py, which problems are left out and why in faults.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from owpo_megatron.config import DataConfig, SourceConfig
from owpo_megatron.data import hub
from owpo_megatron.data.contamination import Contamination
from owpo_megatron.data.faults import fold, leave_out, with_unique_ids
from owpo_megatron.data.files import SUFFIXES, records_of, suffix_of
from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.records import HELP, READ, problem_of, with_help
from owpo_megatron.data.tasks import get_task
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

LEFT_OUT = ("repeated", "contradictory")  # by default


@dataclass(frozen=True)
class SourceReport:
    """Counts of a source's records.

    Example:
        SourceReport(source="dapo.jsonl", read=17895, repeated=980, contradictory=30, too_long=12, used=16873,
                     contradictory_ids=("dapo-00035", "dapo-00179"))
    """

    source: str
    read: int  # records in the source
    repeated: int = 0  # left out: the same problem with the same answer came before
    contradictory: int = 0  # left out: the problem is also there with another answer
    lookalike: int = 0  # left out: one with the same letters and digits has another answer
    long_answer: int = 0  # left out: an integer of more than 15 digits
    contaminated: int = 0  # left out: is in an evaluation set
    too_long: int = 0  # left out: more tokens than data.max_prompt_tokens
    used: int = 0  # after all that and data.limit
    contradictory_ids: tuple[str, ...] = ()  # the first few
    same_id: int = 0  # used under a new id, ID#2: another problem had theirs
    bos: str = ""  # what every prompt begins with
    lacks_bos: str = ""  # what the chat template leaves out, and the tokenizer puts before plain texts

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
        notes = [f"left out: {', '.join(left_out)}"] if left_out else []
        if self.same_id:
            notes.append(f"{self.same_id} with an id of another one, now ID#2")
        if self.bos:
            notes.append(f"prompts begin with {self.bos}")
        if self.lacks_bos:
            notes.append(f"the chat template leaves out {self.lacks_bos}, which the tokenizer puts before plain texts")
        return f"{self.source}: {self.used} of {self.read} problems" + (f" ({'; '.join(notes)})" if notes else "")


def load_prompts(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: Split = "train",
    limit: int | None = None,
    date: datetime.date | None = None,
    first: int | None = None,
) -> tuple[list[Prompt], SourceReport]:
    """Prompts of a run: training ones from `data.source(s)`, test ones from `data.eval_source` or the task's own split.

    Args:
        limit: limit of the test split (`eval.limit`); the train split has `data.limit`.
        date: what a chat template prints as today, unless `data.date` is set.
        first: look at these first records only, to find a mistake soon.

    Raises:
        UserError: the source cannot be read, a record is faulty, the template refuses one, or nothing is left.
    """
    template = PromptTemplate.of(config, tokenizer, date)
    if split == "train":
        problems, report = training_problems(config, first)
        limit = config.limit
    else:
        problems, report = _test_problems(config)
    prompts: list[Prompt] = []
    too_long = 0
    for source, problem in problems:
        if limit is not None and len(prompts) == limit:
            break
        prompt = template.prompt(problem, source=source)
        if len(prompt.token_ids) > config.max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(prompt)
    if not prompts:
        raise UserError(
            "data.max_prompt_tokens", config.max_prompt_tokens, f"no prompt of {report.source} is that short; raise it"
        )
    bos = tokenizer.decode_all(tokenizer.bos_ids) if tokenizer.bos_ids else ""
    lacking = bool(bos) and template.lacks_bos
    return prompts, replace(
        report,
        too_long=too_long,
        used=len(prompts),
        bos="" if lacking else bos,
        lacks_bos=bos if lacking else "",
    )


def load_problems(
    source: str,
    split: Split = "train",
    limit: int | None = None,
    leaving_out: Collection[str] = LEFT_OUT,
    against: Sequence[str] = (),
    overlap: float = 0.8,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Problem], SourceReport]:
    """The first `limit` problems of a source, in its order, without those of the kinds `leaving_out`.

    Args:
        source: `task:NAME`, `hub:OWNER/NAME...`, or the path of a file (the last two have one split
            only).
        leaving_out: see `data.leave_out`. Contradictory problems go altogether: no response to one can be called right.
        against, overlap: evaluation sets, and the shared part that counts, for `contaminated`.
        columns: see `data.columns`.

    Raises:
        UserError: an unknown source or task, a missing or unreadable file, or a faulty record (named file:line).
    """
    if source.startswith("task:"):
        problems = get_task(source.removeprefix("task:")).problems(split)[:limit]
        return problems, SourceReport(source, read=len(problems), used=len(problems))
    kept, report = _without_faults(read_problems(source, columns=columns), source, leaving_out, against, overlap)
    return kept[:limit], replace(report, used=len(kept[:limit]))


def training_problems(
    config: DataConfig, first: int | None = None, helped: bool = False
) -> tuple[list[tuple[int, Problem]], SourceReport]:
    """(which source, problem) of every training problem; faults are looked for in all sources together.

    Args:
        first: look at these first records only.
        helped: with solutions and hints.
    """
    parts = config.parts
    if len(parts) == 1 and parts[0].source.startswith("task:"):
        problems = get_task(parts[0].source.removeprefix("task:")).problems("train")[: parts[0].limit]
        report = SourceReport(parts[0].source, read=len(problems), used=len(problems))
        domain = parts[0].domain
        return [(0, problem if domain is None else replace(problem, domain=domain)) for problem in problems], report
    owners: list[int] = []

    def read() -> Iterator[Problem]:
        for number, part in enumerate(parts):
            for problem in islice(_part_problems(part, config, helped), first):
                owners.append(number)
                yield replace(problem, id=f"{len(owners) - 1}\0{problem.id}")  # found again when some are left out

    name = ", ".join(part.source for part in parts)
    kept, report = _without_faults(read(), name, config.leave_out, config.against, config.overlap)
    found: list[tuple[int, Problem]] = []
    counts = [0] * len(parts)
    for problem in kept:
        place, _, own_id = problem.id.partition("\0")
        owner = owners[int(place)]
        limit = parts[owner].limit
        if limit is None or counts[owner] < limit:
            counts[owner] += 1
            found.append((owner, replace(problem, id=own_id)))
    problems, renamed = with_unique_ids(problem for _, problem in found)
    report = replace(
        report, same_id=renamed, contradictory_ids=tuple(one.partition("\0")[2] for one in report.contradictory_ids)
    )
    return [(owner, problem) for (owner, _), problem in zip(found, problems, strict=True)], report


def _part_problems(part: SourceConfig, config: DataConfig, helped: bool) -> Iterator[Problem]:
    columns = config.columns if part.columns is None else part.columns
    for problem in read_problems(part.source, columns=columns, helped=helped):
        yield problem if part.domain is None else replace(problem, domain=part.domain)


def _test_problems(config: DataConfig) -> tuple[list[tuple[int, Problem]], SourceReport]:
    source = config.eval_source or config.source
    if config.eval_source is None and not source.startswith("task:"):
        raise UserError(
            "data.eval_source",
            None,
            f"{source or 'data.sources'} has no test split; name a held-out file, or set eval.before, eval.after and "
            "eval.every to false, false and 0",
        )
    found, report = load_problems(source, "test", columns=config.columns)
    problems, renamed = with_unique_ids(found)
    return [(0, problem) for problem in problems], replace(report, same_id=renamed)


def _without_faults(
    problems: Iterator[Problem], source: str, leaving_out: Collection[str], against: Sequence[str], overlap: float
) -> tuple[list[Problem], SourceReport]:
    index = None
    if "contaminated" in leaving_out:
        index = Contamination((problem for name in against for problem in read_problems(name, "data.against")), overlap)
    if "repeated" in leaving_out:
        folded = fold(problems)
        found, report = list(folded.problems), SourceReport(source, folded.read, folded.repeated)
    else:
        found = list(problems)
        report = SourceReport(source, len(found))
    kept, out = leave_out(tuple(found), leaving_out, index)
    if not report.read:
        raise UserError("data.source", source, "holds no records")
    if not kept:
        raise UserError("data.leave_out", list(leaving_out), f"leaves nothing of {source}; see `owpo data check`")
    return kept, replace(
        report,
        contradictory=len(out.get("contradictory", ())),
        lookalike=len(out.get("lookalike", ())),
        long_answer=len(out.get("long_answer", ())),
        contaminated=len(out.get("contaminated", ())),
        used=len(kept),
        contradictory_ids=tuple(out.get("contradictory", ())[:10]),
    )


def read_problems(
    source: str, field: str = "data.source", columns: Mapping[str, str] | None = None, helped: bool = False
) -> Iterator[Problem]:
    """Every problem of a source, faulty ones included, one at a time; `helped`: with solutions and hints.

    Raises:
        UserError: as for `load_problems`; `field` is named where the source itself is at fault.
    """
    if source.startswith("task:"):
        yield from get_task(source.removeprefix("task:")).problems("train")
        return
    names = (
        (READ if helped else READ - set(HELP))
        | {name.partition(".")[0] for name in (columns or {}).values()}
        | set((columns or {}).values())
    )
    index = 0
    for path in source_files(source, field):
        for place, record in records_of(path, names, field):
            problem = problem_of(record, place, index, columns)
            yield with_help(problem, record, place, columns) if helped else problem
            index += 1


def source_files(source: str, field: str = "data.source") -> list[Path]:
    """The files of a source that is not a task; those of the hub are downloaded.

    Raises:
        UserError: an unknown kind of source, no such file, or the hub's troubles (hub.py).
    """
    if source.startswith(hub.PREFIX):
        return hub.hub_files(source, field)
    path = Path(source)
    if not suffix_of(path):
        kinds = ", ".join(SUFFIXES)
        remedy = f"give `task:NAME`, a file that ends in {kinds} (also .gz, but for Parquet), or `hub:OWNER/NAME`"
        raise UserError(field, source, remedy)
    if not path.is_file():
        raise UserError(field, source, "is a folder; name a file in it" if path.is_dir() else "no such file")
    return [path]


def check_source(source: str, field: str = "data.source", columns: Mapping[str, str] | None = None) -> None:
    """Read a source's first record before a run starts, which downloads a set of the hub.

    Raises:
        UserError: as for `read_problems`, there is no such task, or it holds no records.
    """
    if source.startswith("task:"):
        get_task(source.removeprefix("task:"))
    elif next(read_problems(source, field, columns), None) is None:
        raise UserError(field, source, "holds no records")
