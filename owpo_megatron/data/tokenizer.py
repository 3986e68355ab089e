"""Tokenizers as the trainer uses them: prompts to ids, responses to text, and the ids that end a response."""

from __future__ import annotations

import datetime
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.data.problem import Message
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.opening import REASONING_MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is in every folder


class Tokenizer:
    """A tokenizer as the trainer uses it: prompts to ids, responses to text, and the ids that end a response.

    Args:
        tokenizer: any Hugging Face tokenizer.
        generation_eos_ids: further ids that end a response, from generation_config.json.
        vocab_size: vocabulary size of the model; no id may reach it. None: unknown.

    Raises:
        UserError: no id ends a response, or the model lacks one of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        generation_eos_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ):
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *generation_eos_ids]))
        if not self.eos_ids:
            raise UserError(
                "model.path",
                tokenizer.name_or_path,
                "neither the tokenizer nor generation_config.json names an eos token; add eos_token_id to one of them",
            )
        self.check_ids(self.eos_ids, "the end of a response")
        self.pad_id: int = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._marks = _special_marks(tokenizer)

    def __len__(self) -> int:
        """Number of token ids; the model's vocabulary may be padded to more."""
        return len(self._tokenizer)

    @property
    def name(self) -> str:
        """Path that it was read from."""
        return str(self._tokenizer.name_or_path)

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """Ids that this tokenizer puts before a plain text, e.g. `<s>`; none for most families."""
        plain = self._tokenizer.encode("1", add_special_tokens=False)
        whole = self._tokenizer.encode("1", add_special_tokens=True)
        starts = range(len(whole) - len(plain) + 1)
        start = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
        return tuple(whole[:start])

    def encode(self, text: str, bos: bool = False) -> tuple[int, ...]:
        """Ids of a prompt.

        Args:
            bos: begin with what the tokenizer puts before a plain text; never twice, and never an eos token behind it.
                False for the text of a chat template, which has its special tokens itself.

        Raises:
            UserError: the text has a character that this tokenizer does not know, or an id that the model does not.
        """
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise UserError(
                "data.source",
                repr(_short(text)),
                f"the tokenizer of {self.name} does not know all of these characters; use a model made for this source",
            )
        ids = self._with_bos(ids, bos)
        self.check_ids(ids, f"the prompt {_short(text)!r}")
        return ids

    def _with_bos(self, ids: tuple[int, ...], bos: bool) -> tuple[int, ...]:
        """The ids with what the tokenizer puts before a plain text: once where `bos`, else at most once."""
        prefix = self.bos_ids
        if not prefix:
            return ids
        while ids[: 2 * len(prefix)] == prefix * 2:
            ids = ids[len(prefix) :]
        if not bos:
            return ids
        start = next((at for at, one in enumerate(ids) if one not in prefix), len(ids))  # also a part of a longer one
        return prefix + ids[start:]

    def check_ids(self, ids: Iterable[int], what: str) -> None:
        """Raises UserError where an id is beyond the model's vocabulary: its embedding would be another's, or zeros."""
        beyond = [] if self.vocab_size is None else sorted({one for one in ids if one >= self.vocab_size})
        if beyond:
            tokens = ", ".join(f"{one} ({self._tokenizer.convert_ids_to_tokens(one)})" for one in beyond[:3])
            raise UserError(
                "model.path",
                self.name,
                f"{what} has token {tokens}, but the model has only {self.vocab_size} (vocab_size in config.json): "
                "resize its embeddings, or use the tokenizer that it was made with",
            )

    def check_stop(self, texts: Iterable[str]) -> None:
        """Raises UserError where a text that ends a response (`rollout.stop`) has a token that the model lacks: it
        would never be generated, and no response would end there."""
        for text in texts:
            self.check_ids(self._tokenizer.encode(text, add_special_tokens=False), f"rollout.stop {_short(text)!r}")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, spaces left as they are; special tokens dropped, except those around reasoning."""
        if self._marks.keys().isdisjoint(ids):
            return self._decode(ids)
        parts: list[str] = []
        start = 0
        for place, one in enumerate(ids):
            if one in self._marks:
                parts += [self._decode(ids[start:place]), self._marks[one]]
                start = place + 1
        return "".join(parts) + self._decode(ids[start:])

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of a prompt, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str:
        """The text of its chat template; "" without one."""
        return str(self._tokenizer.get_chat_template()) if self.has_chat_template else ""

    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> str:
        """A conversation by the tokenizer's chat template, with the opening of the assistant's turn.

        Args:
            template: the text of another template.
            arguments: further variables of the template.
            date: what `strftime_now` prints, at midnight; None: now.

        Raises:
            jinja2.TemplateError, ValueError: or any other error of the template.
        """
        further = dict(arguments or {})
        if date is not None:
            midnight = datetime.datetime.combine(date, datetime.time())
            further["strftime_now"] = midnight.strftime
        continued = messages[-1].continued
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **further,
            )
        )


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; eos ids also come from its generation_config.json.

    Raises:
        UserError: no folder, no tokenizer in it, a file that cannot be read, or ids that the model does not have.
    """
    folder = Path(path)
    check_tokenizer_files(folder)
    from transformers import AutoTokenizer  # seconds, with torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        eos_ids = generation_eos_ids(folder / "generation_config.json")
        vocab_size = vocab_size_of(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError("model.path", folder, f"its tokenizer cannot be read: {_first_line(error)}") from error
    return Tokenizer(tokenizer, eos_ids, vocab_size)


def check_tokenizer_files(folder: Path, field: str = "model.path") -> None:
    """Refuse what `load_tokenizer` could not read, by the files alone: imports neither torch nor transformers.

    Raises:
        UserError: no folder, no tokenizer in it, a broken one, or one that needs its own code or what is not installed.
    """
    if not folder.is_dir():
        raise UserError(field, folder, "no such folder; give a Hugging Face checkpoint folder")
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(field, folder, "holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_bytes()) if (folder / name).is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(field, folder / name, f"its tokenizer cannot be read: {_first_line(error)}") from error
        if not isinstance(content, dict):
            raise UserError(field, folder / name, "its tokenizer cannot be read: not an object; copy it again")
    if "tokenizer.json" in found:
        return
    save = "save it as tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    if "AutoTokenizer" in (content.get("auto_map") or {}):
        raise UserError(field, folder, f"its tokenizer is code of its own, which is not executed; where it is, {save}")
    if "tokenizer.model" in found and importlib.util.find_spec("sentencepiece") is None:
        remedy = f"holds tokenizer.model alone, which needs sentencepiece: pip install sentencepiece, or {save}"
        raise UserError(field, folder, remedy)


def generation_eos_ids(file: Path) -> list[int]:
    """Ids that end a response by a generation_config.json; none where there is no such file."""
    if not file.is_file():
        return []
    ids = json.loads(file.read_text()).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def vocab_size_of(file: Path) -> int | None:
    """The model's vocabulary in a config.json; that of its language model where it has several parts."""
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    for section in (config, config.get("text_config") or {}):
        if isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    return None


def _special_marks(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Special tokens around reasoning, which a decoded response keeps; in most families they are plain tokens."""
    known = {mark.lower() for mark in REASONING_MARKS}
    added = tokenizer.added_tokens_decoder.items()
    return {one: str(token.content) for one, token in added if token.special and token.content.lower() in known}


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
