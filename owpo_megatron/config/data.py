"""The section `data:`: where problems come from and how they become prompts."""

from __future__ import annotations

import datetime
import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from owpo_megatron.config.file import Section, written_as
from owpo_megatron.errors import UserError

TEMPLATES = ("raw", "completion", "chat")
COLUMNS = ("id", "problem", "messages", "prompt", "token_ids", "answer", "domain", "solution", "hints")
"""Fields of a record that `columns` can take from a column of another name."""
Template = Annotated[
    str,
    written_as(rf"^({'|'.join(TEMPLATES)}|.+\.jinja2?)$", "use raw, completion, chat, or the path of a .jinja file"),
]


def _known(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"`{name}` is no field of a record; use {', '.join(COLUMNS)}, each with the file's name")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known)]


def _short_name(source: str) -> str:
    """`gsm8k` of `hub:openai/gsm8k:main/*.parquet`, `train` of `data/train.jsonl`, `cipher` of `task:cipher`."""
    kind, colon, rest = source.partition(":")
    if colon and kind == "hub":
        return re.split("[:@]", rest)[0].rpartition("/")[2]
    return rest if colon and kind == "task" else PurePath(source).name.partition(".")[0]


class SourceConfig(Section):
    """One of several sources of training problems; a plain name stands for {source: ...}."""

    source: str
    """As `data.source`."""
    weight: float | None = Field(None, gt=0)
    """Share of the training prompts, relative to the other sources' weights; None for all of them: by their sizes."""
    domain: str | None = Field(None, min_length=1)
    """Domain of every problem of this source; None: each record's own."""
    columns: Columns | None = None
    """As `data.columns`; None: those of `data`."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems of this source."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, raw: Any) -> Any:
        return {"source": raw} if isinstance(raw, str) else raw


class DataConfig(Section):
    source: str = ""
    """`task:cipher`, `task:countdown`, a .jsonl, .json, .parquet or .csv file (docs/data.md lists the schemas), or
    `hub:OWNER/NAME[@REVISION][:FILES]`, a data set of the Hugging Face hub (FILES is a pattern of its file names)."""
    sources: list[SourceConfig] = []
    """Several sources instead of one, each with a weight, a domain, columns and a limit of its own."""
    eval_source: str | None = None
    """Held-out problems; for a `task:` the default is its own test split."""
    columns: Columns = {}
    """Where a file has other names: `{problem: question, answer: reward_model.ground_truth}`."""
    template: Template = "raw"
    """`raw`: the problem's text as it is; `completion`: a question-answer frame; `chat`: the tokenizer's template;
    or the path of a .jinja file, which replaces the tokenizer's."""
    template_args: dict[str, Any] = {}
    """Further variables of a chat template, e.g. `{enable_thinking: false}`."""
    date: datetime.date | None = None
    """Today, for templates that print it. None: the day on which the run began, which its checkpoints keep."""
    max_prompt_tokens: int = Field(1024, gt=0)
    """Longer prompts are left out, and counted."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems."""
    leave_out: list[Literal["repeated", "contradictory", "lookalike", "long_answer", "contaminated"]] = [
        "repeated",
        "contradictory",
    ]
    """Training problems to leave out: `repeated` (same text and answer), `contradictory` (same text, another answer),
    `lookalike` (the same letters and digits, another answer), `long_answer` (an integer of more than 15 digits, often
    a rounded float), `contaminated` (found in a set of `against`). docs/data.md"""
    against: list[str] = []
    """Evaluation sets (sources like the above) that `contaminated` looks at."""
    overlap: float = Field(0.8, gt=0, le=1)
    """Share of an evaluation problem's word sequences that a training problem must hold to count as contaminated."""

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources of training problems, whichever way they are given."""
        return self.sources or [SourceConfig(source=self.source)]

    @property
    def source_names(self) -> list[str]:
        """Short names of `sources` for metrics: a file's or repository's own name; the second of a name is NAME#2."""
        names = [_short_name(part.source) for part in self.sources]
        return [name if not (before := names[:place].count(name)) else f"{name}#{before + 1}"
                for place, name in enumerate(names)]  # fmt: skip

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataConfig:
        if not self.source and not self.sources:
            raise UserError("data.source", "(missing)", "required; add it to the config or pass it as an override")
        if self.source and self.sources:
            raise UserError("data.sources", self.source, "data.source names another one: list it in data.sources too")
        weighted = [one.source for one in self.sources if one.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise UserError("data.sources", ", ".join(weighted), "give every source a weight, or none")
        return self

    @model_validator(mode="after")
    def _template_arguments_for_a_template(self) -> DataConfig:
        if self.template_args and self.template in ("raw", "completion"):
            remedy = f"`{self.template}` has no arguments; set data.template to chat or a .jinja file"
            raise UserError("data.template_args", self.template_args, remedy)
        own = sorted({"messages", "add_generation_prompt", "strftime_now"} & self.template_args.keys())
        if own:
            remedy = "is set for every prompt; leave it out" + (
                "" if own[0] != "strftime_now" else ", or set data.date"
            )
            raise UserError(f"data.template_args.{own[0]}", self.template_args[own[0]], remedy)
        return self

    @model_validator(mode="after")
    def _contamination_against_something(self) -> DataConfig:
        if ("contaminated" in self.leave_out) != bool(self.against):
            raise UserError(
                "data.against",
                self.against,
                "`contaminated` in data.leave_out and sets in data.against go together; give both or neither",
            )
        return self
