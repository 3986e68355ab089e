"""Turn problems into prompts: `data.template`, its arguments and its date."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from owpo_megatron.config import DataConfig
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

COMPLETION = "Question: {problem}\nAnswer step by step and put the final answer within \\boxed{{}}.\nSolution:"

# Jinja's own sources of chance. The clock has one name, `strftime_now`, and is fixed.
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


def has_chat_template(folder: Path) -> bool:
    """Whether a Hugging Face folder's tokenizer has a chat template, as far as its files show; imports no tokenizer."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True)
class PromptTemplate:
    r"""Makes prompts of problems.

    `raw` leaves the text as it is; `completion` frames it for a base model and asks for \boxed{}; `chat` is the
    tokenizer's own template; the path of a .jinja file is a template in its place. A prompt begins with the tokenizer's
    BOS token exactly once: `raw` and `completion` get it here, a chat template has it or not.

    Args:
        arguments: further variables of a chat template.
        date: what a template prints as today; None: today.

    Raises:
        UserError: the template is no file, the tokenizer has none, or it has no such arguments.
    """

    name: str
    tokenizer: Tokenizer
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Tokenizer, date: datetime.date | None = None) -> PromptTemplate:
        """The template of a configuration; `date` where it has none of its own."""
        return cls(data.template, tokenizer, data.template_args, data.date or date)

    def __post_init__(self) -> None:
        if not self.is_chat:
            return
        text = self._text or self.tokenizer.chat_template
        if not text:
            remedy = "this tokenizer has no chat template; use `raw` or `completion`, or name a .jinja file"
            raise UserError("data.template", self.name, remedy)
        if drawn := _RANDOM.search(text):
            remedy = f"draws at random ({drawn[0]}), so that a resumed run would have other prompts; leave that out"
            raise UserError("data.template", self.name, remedy)
        for name, value in self.arguments.items():
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise UserError(f"data.template_args.{name}", value, "the template has no such variable; leave it out")

    @property
    def is_chat(self) -> bool:
        return self.name not in ("raw", "completion")

    @property
    def depends_on_date(self) -> bool:
        """Whether the template prints the date."""
        return self.is_chat and "strftime_now" in (self._text or self.tokenizer.chat_template)

    @property
    def lacks_bos(self) -> bool:
        """Whether a chat template leaves out the BOS token that this tokenizer puts before plain texts."""
        bos = self.tokenizer.bos_ids
        if not (self.is_chat and bos):
            return False
        return self.prompt(Problem("", "1", "1", "")).token_ids[: len(bos)] != bos

    def prompt(self, problem: Problem, domain: str | None = None, source: int = 0) -> Prompt:
        """The prompt of a problem.

        Args:
            domain: in place of the problem's own.
            source: which of `data.sources` it is from.

        Raises:
            UserError: the template refuses the conversation, or the tokenizer the text.
        """
        if problem.token_ids:
            self.tokenizer.check_ids(problem.token_ids, f"problem {problem.id}")
            text, token_ids = self.tokenizer.decode_all(problem.token_ids), problem.token_ids
        elif self.is_chat:
            text = self._chat(problem)
            token_ids = self.tokenizer.encode(text)
        else:
            if problem.messages:
                remedy = f"problem {problem.id} is a conversation, which takes `chat` or a .jinja file"
                raise UserError("data.template", self.name, remedy)
            text = problem.text if self.name == "raw" else COMPLETION.format(problem=problem.text)
            token_ids = self.tokenizer.encode(text, bos=True)
        turns = problem.messages or (Message("user", problem.text),)
        messages = tuple((turn.role, turn.content) for turn in turns)
        return Prompt(problem.id, token_ids, text, problem.answer, domain or problem.domain, source, messages=messages)

    @cached_property
    def _text(self) -> str | None:
        """The text of a template of one's own, None for the tokenizer's."""
        if not self.name.endswith((".jinja", ".jinja2")):
            return None
        try:
            return Path(self.name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or "is not UTF-8"
            raise UserError("data.template", self.name, f"{what}; name a readable .jinja file") from error

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation by the chat template, with the opening of the assistant's turn.

        Raises:
            UserError: the template refuses it.
        """
        return self._chat(Problem("(turns)", "", "", "", tuple(messages)))

    def _chat(self, problem: Problem) -> str:
        messages = problem.messages or (Message("user", problem.text),)
        try:
            return self.tokenizer.chat(messages, self._text, self.arguments, self.date)
        except Exception as error:  # a template is a program: it may raise anything
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            line = getattr(error, "lineno", None)
            where = f", line {line} of the template" if line else ""
            remedy = (
                f"the template cannot take problem {problem.id} ({reason}{where}): change the template, its arguments "
                "(data.template_args), or the conversation"
            )
            raise UserError("data.template", self.name, remedy) from error
