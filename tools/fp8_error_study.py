"""Error of log-probs when the LM head is computed in fewer bits: simulated on a CPU, printed as a table.

    python tools/fp8_error_study.py                                          synthetic heads
    python tools/fp8_error_study.py --model cache/quickstart/cipher --ids 200    hidden states of a real model
    python tools/fp8_error_study.py --random-model                           of half a billion random parameters

Each row rounds something and leaves the rest exact (float32 GEMM of bfloat16 inputs is the reference): the logits to
bfloat16 or float16; the GEMM's operands to e4m3 with one scale per tensor, row or block (1x128 of h, 128x128 of the
weight); then FP8 with its k best columns and the target recomputed exactly; that with its tail shifted by moments of
the weight (head/tail.py), as the head does, or by probes: columns that are computed both ways; and the trap: the target
alone. A second table has the gradients of h and W where the operands of the backward products are rounded to FP8.
Not simulated: the shorter accumulators of Hopper's fast FP8 GEMM, and FP8 in the transformer's body.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.head.fp8 import CANDIDATES, E4M3_MAX, _tail_mean
from owpo_megatron.head.tail import Moments

# name: hidden size, vocabulary, tokens, factor of the outlier channels
SYNTHETIC = {"A": (1024, 32768, 256, 20.0), "B": (2048, 65536, 128, 200.0)}
OUTLIERS = 6  # channels of h that are larger by that factor, as in trained transformers
PROBES = (256, 8192)  # columns, the same for every row
PLANTED = 8  # plausible continuations of every token


def synthetic(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, weight) in bfloat16: heavy-tailed rows of the weight, outlier channels, some plausible candidates a token."""
    hidden, vocab, tokens, factor = SYNTHETIC[name]
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocab, hidden, generator=generator)
    weight_VH *= torch.exp(0.3 * torch.randn(vocab, 1, generator=generator)) / hidden**0.5
    h_TH = torch.randn(tokens, hidden, generator=generator)
    for _ in range(PLANTED):
        pull_T1 = torch.empty(tokens, 1).exponential_(0.25, generator=generator) + 3
        h_TH += pull_T1 * weight_VH[torch.randint(0, vocab, (tokens,), generator=generator)]
    outlier = torch.randint(0, hidden, (OUTLIERS,), generator=generator)
    h_TH[:, outlier] *= factor
    weight_VH[:, outlier] /= factor
    return h_TH.bfloat16(), weight_VH.bfloat16()


def real(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, weight) of a model's own samples."""
    from transformers import AutoModelForCausalLM

    return sampled(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), count)


def random_model(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Qwen2.5-0.5B's shape with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, rope_theta=1e6,
    )  # fmt: skip
    return sampled(Qwen2ForCausalLM(shape), count)


def sampled(model: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` sequences of 24 tokens, drawn at temperature 1 after 6 random ones."""
    torch.manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (count, 6))
    with torch.no_grad():
        for _ in range(18):
            p = torch.softmax(model(ids, use_cache=False, logits_to_keep=1).logits[:, -1], 1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, 6:-1]
    return hidden.flatten(0, 1).bfloat16(), model.lm_head.weight.detach().bfloat16()


def e4m3(value: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    scale = amax.clamp(min=1e-12) / E4M3_MAX
    return (value / scale).to(torch.float8_e4m3fn).float() * scale


def e5m2(value: torch.Tensor) -> torch.Tensor:
    scale = value.abs().amax().clamp(min=1e-12) / torch.finfo(torch.float8_e5m2).max
    return (value / scale).to(torch.float8_e5m2).float() * scale


def per_tensor(value: torch.Tensor) -> torch.Tensor:
    return e4m3(value, value.abs().amax())


def per_row(value: torch.Tensor) -> torch.Tensor:
    return e4m3(value, value.abs().amax(1, keepdim=True))


def per_block(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Blocks of rows x 128; sizes need not divide."""
    height, width = value.shape
    padded = torch.nn.functional.pad(value, (0, -width % 128, 0, -height % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, 128))
    return e4m3(blocks, blocks.abs().amax((1, 3), keepdim=True)).flatten(2).flatten(0, 1)[:height, :width]


def variants(h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(what was rounded, the target's log-prob)."""
    target_T1 = target_T[:, None]

    def logp(logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, 1).gather(1, target_T1)[:, 0]

    h, weight = h_TH.float(), weight_VH.float()
    exact = h @ weight.t()
    yield "logits in bf16", logp(exact.bfloat16().float())
    yield "logits in fp16", logp(exact.half().float())
    yield "FP8, scale a row", logp(per_row(h) @ per_row(weight).t())
    yield "FP8, 1x128 and 128x128 blocks", logp(per_block(h, 1) @ per_block(weight, 128).t())
    yield "FP8 weight only", logp(h @ per_tensor(weight).t())
    fp8 = per_tensor(h) @ per_tensor(weight).t()
    yield "FP8, scale a tensor", logp(fp8)
    for count in (4, 16, CANDIDATES, 64):
        if count < fp8.shape[1]:
            yield f"the same, {count} best and target exact", logp(_refined(fp8, exact, target_T1, count))
    if CANDIDATES < fp8.shape[1]:
        for what, shifted in _shifted(h, weight, exact, target_T1):
            yield f"the same, {CANDIDATES} best, {what}", logp(shifted)
    yield "the same, target alone exact (trap)", exact.gather(1, target_T1)[:, 0] - torch.logsumexp(fp8, 1)


def _refined(fp8: torch.Tensor, exact: torch.Tensor, target_T1: torch.Tensor, count: int = CANDIDATES) -> torch.Tensor:
    columns = torch.cat([fp8.topk(count, 1).indices, target_T1], 1)
    return fp8.scatter(1, columns, exact.gather(1, columns))


def _shifted(
    h: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor, target_T1: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """(what shifts the tail, logits)."""
    rounded = {
        "scale per tensor": (per_tensor(h), per_tensor(weight)),
        "blocks": (per_block(h, 1), per_block(weight, 128)),
    }
    for what, (h8, weight8) in rounded.items():
        fp8 = h8 @ weight8.t()
        if what == "blocks":
            yield "blocks, nothing shifted", _refined(fp8, exact, target_T1)
        columns = torch.cat([fp8.topk(CANDIDATES, 1).indices, target_T1], 1)
        error = Moments.of(weight, weight8, torch.ones(())).of_rows(h, h8)
        shift = error.shift(_tail_mean(fp8, columns), 1.0)[:, None]
        yield f"{what}, shifted by moments", (fp8 + shift).scatter(1, columns, exact.gather(1, columns))
        for count in PROBES:
            probes = torch.arange(count) * (len(weight) // count)
            if what == "blocks" or count > len(weight) // 2:
                continue
            shift = (exact[:, probes].logsumexp(1) - fp8[:, probes].logsumexp(1))[:, None]
            yield f"shifted by {count} probes", (fp8 + shift).scatter(1, columns, exact.gather(1, columns))


def study(name: str, h_TH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    exact = torch.log_softmax(h_TH.float() @ weight_VH.float().t(), 1)
    target_T = torch.multinomial(exact.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    entropy_T = -(exact.exp() * exact).sum(1)
    exact_T = exact.gather(1, target_T[:, None])[:, 0]
    del exact
    uncertain = entropy_T >= entropy_T.quantile(0.8)
    shape = f"T={len(h_TH)}, H={h_TH.shape[1]}, V={len(weight_VH)}"
    print(f"\n### {name}: {shape}, mean entropy {entropy_T.mean():.2f}\n")
    print("| abs error of logp | mean | mean of the 20 % most uncertain | p99 | largest |\n|-|-|-|-|-|")
    for what, logp_T in variants(h_TH, weight_VH, target_T):
        error = (logp_T - exact_T).abs()
        cells = [error.mean(), error[uncertain].mean(), error.quantile(0.99), error.max()]
        print(f"| {what} | " + " | ".join(f"{float(cell):.1e}" for cell in cells) + " |")
    backward(h_TH, weight_VH, target_T)


def backward(h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> None:
    """Print what dh and dW are off by where the operands of their products are rounded, for rows of unequal weight."""
    h, weight = h_TH.float(), weight_VH.float()
    h8, weight8 = per_tensor(h), per_tensor(weight)
    slope_T = torch.randn(len(h), generator=torch.Generator().manual_seed(2))
    dlogits = -torch.softmax(h @ weight.t(), 1)
    dlogits = dlogits.scatter_add_(1, target_T[:, None], torch.ones(len(h), 1)).mul_(slope_T[:, None])
    exact = dlogits @ weight, dlogits.t() @ h
    print("\n| operands of dgrad and wgrad | 1 - cosine of dh | of dW | norm of dh off by | of dW |\n|-|-|-|-|-|")
    rounded = {
        "bf16": (dlogits.bfloat16().float(), h, weight),
        "e4m3, scale per tensor": (per_tensor(dlogits), h8, weight8),
        "e4m3, gradient of the logits with a scale per row": (per_row(dlogits), h8, weight8),
        "gradient of the logits in e5m2": (e5m2(dlogits), h8, weight8),
        "that gradient alone in e4m3, scale per row": (per_row(dlogits), h, weight),
    }
    for what, (grad, h_in, weight_in) in rounded.items():
        found = grad @ weight_in, grad.t() @ h_in
        pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(exact, found, strict=True)]
        cells = [1 - torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]
        cells += [(b.norm() / a.norm() - 1).abs() for a, b in pairs]
        print(f"| {what} | " + " | ".join(f"{float(cell):.1e}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="HF folder; without it: the synthetic heads")
    parser.add_argument("--random-model", action="store_true", help="of the shape of Qwen2.5-0.5B; minutes")
    parser.add_argument("--ids", type=int, default=200, help="sequences to draw from the model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model:
        study(arguments.model.name, *real(arguments.model, arguments.ids))
        return
    if arguments.random_model:
        study("random 0.5 B", *random_model(16))
        return
    for name in SYNTHETIC:
        study(name, *synthetic(name))


if __name__ == "__main__":
    main()
