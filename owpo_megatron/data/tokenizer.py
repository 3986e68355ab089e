"""Tokenizers: a thin loader for the trainer, and two makers of small Hugging Face tokenizers.

The makers write ordinary folders (tokenizer.json, tokenizer_config.json) that `transformers.AutoTokenizer`, and so
SGLang, loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


class Tokenizer:
    """What the trainer needs of a tokenizer: prompts in, responses out, and when to stop.

    Args:
        tokenizer: any Hugging Face tokenizer.
        generation_eos_ids: further ids that end a response, from generation_config.json.

    Raises:
        UserError: nothing says how a response ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, generation_eos_ids: Iterable[int] = ()):
        self._tokenizer = tokenizer
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *generation_eos_ids]))
        if not self.eos_ids:
            raise UserError(
                "model.path",
                tokenizer.name_or_path,
                "neither the tokenizer nor generation_config.json names an eos token; add eos_token_id to one of them",
            )
        self.pad_id: int = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __len__(self) -> int:
        """Number of token ids; the model's vocabulary may be padded to more."""
        return len(self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt, with no special token added.

        Raises:
            UserError: the text has a character that this tokenizer does not know.
        """
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UserError(
                "data.source",
                repr(shown),
                f"the tokenizer of {self._tokenizer.name_or_path} does not know all of these characters; "
                "use a model made for this source",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, special tokens dropped, spaces left as they are."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def chat(self, text: str) -> str:
        """The text as a user's message, with the opening of the assistant's turn (the tokenizer's own template)."""
        message = [{"role": "user", "content": text}]
        return str(self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; eos ids also come from its generation_config.json.

    Raises:
        UserError: no folder, no tokenizer in it, or a file that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if not folder.is_dir():
        raise UserError("model.path", folder, "no such folder; give a Hugging Face checkpoint folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError("model.path", folder, "holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        generation_eos_ids = _generation_eos_ids(folder / "generation_config.json")
    except (OSError, ValueError) as error:
        raise UserError("model.path", folder, f"its tokenizer cannot be read: {_first_line(error)}") from error
    return Tokenizer(tokenizer, generation_eos_ids)


def make_character_tokenizer(alphabet: str, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """One token a character; eos, pad and unknown are ids 0, 1 and 2.

    Args:
        alphabet: characters, each once; they get ids from 3 on, in this order.
        vocab_size: fill up with `<unused_i>` tokens to this size. They are ordinary tokens, so that a model with a
            padded vocabulary cannot hide one of them in a response that then looks right.

    Raises:
        ValueError: a character stands twice, or vocab_size is too small.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} has a character twice")
    return _without_merges([EOS, PAD, UNKNOWN, *alphabet], vocab_size, byte_level=False)


def make_byte_tokenizer(vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, for any text; eos and pad are ids 0 and 1, byte b has one of the ids 2 to 257.

    As with every Hugging Face tokenizer, a text that spells a special token (`<pad>`) gets its id.

    Args:
        vocab_size: as in `make_character_tokenizer`.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-untyped]

    return _without_merges([EOS, PAD, *sorted(ByteLevel.alphabet())], vocab_size, byte_level=True)


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast, multiple: int = 16) -> int:
    """The smallest multiple that has room for every token, so that tensor parallelism can divide the vocabulary."""
    return -(-len(tokenizer) // multiple) * multiple


def _without_merges(tokens: list[str], vocab_size: int | None, byte_level: bool) -> PreTrainedTokenizerFast:
    """BPE without merges takes a text apart into its characters (or bytes), whatever they are."""
    from tokenizers import Tokenizer as Backend  # type: ignore[import-untyped]
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = len(tokens) if vocab_size is None else vocab_size
    if size < len(tokens):
        raise ValueError(f"vocab_size {size} is too small for {len(tokens)} tokens")
    tokens = tokens + [f"<unused_{i}>" for i in range(size - len(tokens))]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=None if byte_level else UNKNOWN))
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.decoder = decoders.Fuse()
    special = {} if byte_level else {"unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False, **special
    )


def _generation_eos_ids(file: Path) -> list[int]:
    if not file.is_file():
        return []
    ids = json.loads(file.read_text()).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
