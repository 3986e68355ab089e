"""Make a small random Qwen3 with a byte-level tokenizer, as a Hugging Face folder.

python examples/dapo_math_cpu/make_model.py --out cache/dapo_math_cpu/model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from owpo_megatron.data.small_tokenizers import make_byte_tokenizer, padded_vocab_size


def make_random_model(out: Path, seed: int = 1) -> None:
    """Write the model and its tokenizer to `out`: 0.3 M parameters, all sizes even for tensor parallelism of 2."""
    tokenizer = make_byte_tokenizer(padded_vocab_size(make_byte_tokenizer()))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # named, it would get an embedding of exactly zero, behind which gradients are huge
        dtype="float32",
    )
    torch.manual_seed(seed)
    disable_progress_bar()
    Qwen3ForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cache/dapo_math_cpu/model"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    make_random_model(options.out, options.seed)
    print(f"random model: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
