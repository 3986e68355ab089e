"""Makers of small Hugging Face tokenizers: a token per character, or per byte.

They write ordinary folders (tokenizer.json, tokenizer_config.json) that `transformers.AutoTokenizer`, and so SGLang,
loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


def make_character_tokenizer(alphabet: str, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """One token per character; eos, pad and unknown are ids 0, 1 and 2.

    Args:
        alphabet: characters, each once; they get ids from 3 on, in this order.
        vocab_size: fill up with `<unused_i>` tokens to this size. They are ordinary tokens, so that a model with a
            padded vocabulary cannot hide one of them in a response that then looks right.

    Raises:
        ValueError: a character is given twice, or vocab_size is too small.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} has a character twice")
    return _without_merges([EOS, PAD, UNKNOWN, *alphabet], vocab_size, byte_level=False)


def make_byte_tokenizer(vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, for any text; eos and pad are ids 0 and 1, byte b has one of the ids 2 to 257.

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
    """BPE without merges splits any text into its characters (or bytes)."""
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
