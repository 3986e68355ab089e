"""Run in SGLang's environment: compute the values that test_cpu_plugin.py asserts on, and print them as JSON."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sglang.srt.layers.sampler as sampler
import sglang.srt.mem_cache.pool_host.common as pool_host
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from owpo_sglang_cpu import attention, decode, invariance, sampling, served, symbols


def murmur3_x86_32(data: bytes) -> int:
    """MurmurHash3 of a multiple of four bytes with seed 0, one block at a time (Appleby's smhasher)."""
    h = 0
    for start in range(0, len(data), 4):
        k = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        k = (k << 15 | k >> 17) & 0xFFFFFFFF
        h ^= k * 0x1B873593 & 0xFFFFFFFF
        h = (h << 13 | h >> 19) & 0xFFFFFFFF
        h = (h * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def hashes() -> dict[str, Any]:
    seeds = [0, 1, 77, 2**32 + 5, 2**63 - 1]
    positions = [0, 3, 1000, 2, 2**31]
    rows = sampling.row_states(np.array(seeds, np.uint64), np.array(positions, np.uint32))
    ours = sampling.hash_columns(rows, 7).tolist()
    theirs = [
        [murmur3_x86_32(s.to_bytes(8, "little") + p.to_bytes(4, "little") + c.to_bytes(4, "little")) for c in range(7)]
        for s, p in zip(seeds, positions, strict=True)
    ]
    return {"published": murmur3_x86_32(b"test"), "ours": ours, "theirs": theirs}


def draws_of_stock() -> dict[str, Any]:
    """SGLang's own draw, uncompiled, with its CUDA-only hash computed by the scalar reference above."""

    def scalar_hash(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        rows = []
        for s, p in zip(seed.tolist(), positions.tolist(), strict=True):
            head = s.to_bytes(8, "little") + p.to_bytes(4, "little")
            rows.append([murmur3_x86_32(head + c.to_bytes(4, "little")) for c in columns.tolist()])
        return torch.tensor(rows, dtype=torch.uint32)

    torch.manual_seed(0)
    logprobs = (2 * torch.randn(200, 33)).log_softmax(-1)
    logprobs[:, 5] = -torch.inf
    seeds, positions = torch.randint(0, 2**62, (200,)), torch.randint(0, 4096, (200,))
    sampler.murmur_hash32 = scalar_hash
    compiled = sampler.multinomial_with_seed  # the plain function where TORCHDYNAMO_DISABLE is set
    stock = getattr(compiled, "_torchdynamo_orig_callable", compiled)(logprobs, seeds, positions)
    ours = sampling.multinomial_with_seed(logprobs, seeds, positions)
    rows = [slice(row, row + 1) for row in range(200)]
    one_by_one = [sampling.multinomial_with_seed(logprobs[r], seeds[r], positions[r]).item() for r in rows]
    return {"stock": stock.view(-1).tolist(), "ours": ours.view(-1).tolist(), "one_by_one": one_by_one}


def quick_draws() -> dict[str, int]:
    """Rows drawn in float32 alone, rows drawn again in float64, and rows with another token than float64 gives."""
    torch.manual_seed(5)
    quick = exact = wrong = 0
    cases = [(scale * torch.randn(1500, 700)).softmax(-1) for scale in (0.01, 0.3, 1.0, 4.0, 30.0)]
    # The likely token's noise is among the lowest in one row of a thousand, where float32 does not suffice
    cases.append(torch.tensor([0.9, 0.1]).expand(300_000, 2).contiguous())
    for probs in cases:
        n = len(probs)
        seeds, positions = torch.randint(0, 2**31, (n,)), torch.randint(0, 4096, (n,))
        rows = sampling.row_states(seeds.numpy().astype(np.uint64), positions.numpy().astype(np.uint32))
        sure = sampling._draw_quickly(probs.numpy(), rows)[1]
        quick, exact = quick + int(sure.sum()), exact + int((~sure).sum())
        expected = sampling._draw_exactly(probs.log(), rows)
        filtered = sampling.multinomial_with_seed(probs.double().log(), seeds, positions)
        for drawn in (sampling.draw_from_probs(probs, seeds, positions), filtered):
            wrong += int((drawn != expected).sum())
    return {"quick": quick, "exact": exact, "wrong": wrong}


def distribution() -> dict[str, Any]:
    """Count draws of each of 8 tokens: over 20000 seeds at one position, and over 20000 positions of one seed."""
    torch.manual_seed(1)
    logprobs = torch.randn(8).log_softmax(-1)
    many, numbers = logprobs.expand(20000, 8), torch.arange(20000)
    over_seeds = sampling.multinomial_with_seed(many, numbers, torch.full_like(numbers, 17))
    over_positions = sampling.multinomial_with_seed(many, torch.full_like(numbers, 1234567), numbers)
    counts = [draws.view(-1).bincount(minlength=8).tolist() for draws in (over_seeds, over_positions)]
    return {"probabilities": logprobs.exp().tolist(), "counts": counts}


def attention_differences() -> dict[str, float]:
    """Largest difference between the batched attention and the loop that it replaces."""
    torch.manual_seed(2)
    heads, kv_heads, size, slots = 4, 2, 16, 600
    k_cache, v_cache = torch.randn(slots, kv_heads, size), torch.randn(slots, kv_heads, size)
    req_to_token = torch.randperm(slots)[:560].view(8, 70).to(torch.int32)
    requests = torch.tensor([6, 0, 3, 5, 1])
    all_lens, prefix = torch.tensor([70, 1, 33, 9, 20]), torch.tensor([60, 0, 0, 8, 0])
    strangers = torch.ones(slots, dtype=torch.bool)
    for request, length in zip(requests.tolist(), all_lens.tolist(), strict=True):
        strangers[req_to_token[request, :length].long()] = False
    k_cache[strangers] = v_cache[strangers] = torch.nan
    backend = TorchNativeAttnBackend
    loop_decode, loop_extend = backend._run_sdpa_forward_decode, backend._run_sdpa_forward_extend
    attention.install(backend)
    result = {}
    for budget in (1 << 16, 64):  # one slice, and several
        attention.MAX_GATHERED_TOKENS = budget
        query = torch.randn(5, heads, size)
        cache = (k_cache, v_cache, req_to_token, requests, all_lens)
        options = {"scaling": 0.3, "enable_gqa": True}
        expected = loop_decode(backend, query, torch.empty_like(query), *cache, **options)
        got = backend._run_sdpa_forward_decode(None, query, torch.empty_like(query), *cache, **options)
        result[f"decode/{budget}"] = (got - expected).abs().max().item()
    for gathered, budget in ((1 << 16, 1 << 22), (100, 1 << 22), (1 << 16, 1000)):  # one pass, slices, blocks of rows
        attention.MAX_GATHERED_TOKENS, attention.MAX_MASK_ELEMENTS = gathered, budget
        query = torch.randn(int((all_lens - prefix).sum()), heads, size)
        arguments = (*cache, prefix, all_lens - prefix)
        options = {"scaling": 0.3, "enable_gqa": True, "causal": True}
        expected = loop_extend(backend, query, torch.empty_like(query), *arguments, **options)
        got = backend._run_sdpa_forward_extend(None, query, torch.empty_like(query), *arguments, **options)
        result[f"extend/{gathered}/{budget}"] = (got - expected).abs().max().item()
    attention.MAX_GATHERED_TOKENS, attention.MAX_MASK_ELEMENTS = 1 << 16, 1 << 22
    for window in (0, 5, 100):  # tokens before the own one
        options["sliding_window_size"] = window
        expected = loop_extend(backend, query, torch.empty_like(query), *arguments, **options)
        got = backend._run_sdpa_forward_extend(None, query, torch.empty_like(query), *arguments, **options)
        result[f"window/{window}"] = (got - expected).abs().max().item()
        one = torch.randn(5, heads, size)
        of_decode = {"scaling": 0.3, "enable_gqa": True, "sliding_window_size": window}
        expected = loop_decode(backend, one, torch.empty_like(one), *cache, **of_decode)
        got = backend._run_sdpa_forward_decode(None, one, torch.empty_like(one), *cache, **of_decode)
        result[f"window/decode/{window}"] = (got - expected).abs().max().item()
    return result | {"sinks": sink_difference(query, cache, prefix)}


def sink_difference(query: torch.Tensor, cache: tuple[torch.Tensor, ...], prefix: torch.Tensor) -> float:
    """Largest difference between attention with sinks and a window, and the definition token by token."""
    k_cache, v_cache, req_to_token, requests, all_lens = cache
    heads, groups = query.shape[1], k_cache.shape[1]
    sinks, window = torch.randn(heads), 7
    options = {"scaling": 0.3, "enable_gqa": True, "causal": True, "sliding_window_size": window}
    backend = SimpleNamespace(owpo_sinks=sinks)
    extend = TorchNativeAttnBackend._run_sdpa_forward_extend
    got = extend(backend, query, torch.empty_like(query), *cache, prefix, all_lens - prefix, **options)
    rows = []
    for request, before, length in zip(requests.tolist(), prefix.tolist(), all_lens.tolist(), strict=True):
        slots = req_to_token[request].long()
        for token in range(before, length):
            seen = slots[max(0, token - window) : token + 1]
            for head in range(heads):
                group = head * groups // heads
                scores = 0.3 * k_cache[seen, group] @ query[len(rows) // heads, head]
                shares = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
                rows.append(shares @ v_cache[seen, group])
    return (got - torch.stack(rows).view_as(got)).abs().max().item()


def invariance_failures() -> list[str]:
    """Return the products and attentions whose rows have other bits in a smaller batch, or that are wrong."""
    torch.manual_seed(3)
    failures = []
    own_threads = torch.get_num_threads()
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        for inner, outer in ((48, 72), (80, 48), (896, 130)):
            a, b, bias = torch.randn(200, inner), torch.randn(outer, inner), torch.randn(outer)
            exact = a.double() @ b.double().t() + bias
            whole = torch.nn.functional.linear(a, b, bias)
            if (whole - exact).abs().max() > 1e-3:
                failures.append(f"product {inner}x{outer} is wrong with {threads} threads")
            for rows in (1, 32, 33, 100, 200):
                if not torch.equal(invariance.mm(a[:rows], b.t()), invariance.in_blocks(a[:rows], b.t())):
                    failures.append(f"product {inner}x{outer} of {rows} rows is not that of the blocks")
            for first, rows in ((0, 1), (7, 1), (3, 5), (30, 16), (100, 17), (60, 128)):
                part = torch.nn.functional.linear(a[first : first + rows], b, bias)
                if not torch.equal(part, whole[first : first + rows]):
                    failures.append(f"product {inner}x{outer}, {rows} rows from {first}, {threads} threads")
    torch.set_num_threads(own_threads)
    k_cache, v_cache, query = torch.randn(900, 2, 12), torch.randn(900, 2, 12), torch.randn(6, 4, 12)
    req_to_token, requests = torch.randperm(900).view(6, 150), torch.arange(6)
    lens, one = torch.tensor([1, 7, 16, 33, 64, 150]), torch.ones(6, dtype=torch.long)
    options = {"scaling": None, "enable_gqa": True}
    attention.MAX_GATHERED_TOKENS, attention.MAX_MASK_ELEMENTS = 1 << 16, 1 << 22
    cache = (k_cache, v_cache, req_to_token)
    whole = attention._attend(query, torch.empty_like(query), *cache, requests, lens, lens - 1, one, **options)
    for r in (slice(row, row + 1) for row in range(6)):
        arguments = (requests[r], lens[r], lens[r] - 1, one[r])
        part = attention._attend(query[r], torch.empty_like(query[r]), *cache, *arguments, **options)
        if not torch.equal(part, whole[r]):
            failures.append(f"attention over {lens[r].item()} tokens")
    return failures


class Pool:
    """A cache of 3 requests, 50 tokens each at most, in slots of no order; its keys and values are known per token."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        self.table = torch.randperm(150, generator=generator).view(3, 50)
        self.tokens = torch.randn(3, 2, 50, 2, 12, generator=generator)  # request, key or value, token, head, size
        self.caches = [torch.full((150, 2, 12), torch.nan) for _ in range(2)]

    def write(self, request: int, tokens: slice) -> None:
        for cache, values in zip(self.caches, self.tokens[request], strict=True):
            cache[self.table[request, tokens]] = values[tokens]

    def step(self, rows: decode.Rows, query: torch.Tensor, requests: list[int], lengths: list[int]) -> torch.Tensor:
        """One decode step of these requests, whose newest token is written first."""
        for request, length in zip(requests, lengths, strict=True):
            self.write(request, slice(length - 1, length))
        new = [
            torch.stack([self.tokens[r, kind, n - 1] for r, n in zip(requests, lengths, strict=True)])
            for kind in (0, 1)
        ]
        plan = rows.step(torch.tensor(requests), torch.tensor(lengths))
        keys, values = rows.of_layer(0, plan, new, self.caches, self.table)
        return decode.attend(query[requests], keys, values, plan, 0.3)

    def expected(self, query: torch.Tensor, request: int, length: int) -> torch.Tensor:
        key, value = (kind[:length].transpose(0, 1)[None].double() for kind in self.tokens[request])
        one = query[request][:, None].transpose(0, 1)[None].double().transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(one, key, value, scale=0.3, enable_gqa=True)
        return attended[0, :, 0]


def decode_failures(narrow: int) -> list[str]:
    """Steps in which rows are made, go on, end, come back and are replaced: against SDPA, and alone, bit for bit."""
    decode.NARROW, decode.USED = narrow, 0.75
    query = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(7))
    pool, rows, failures = Pool(), decode.Rows(), []
    for request, length in enumerate((5, 30, 47)):
        pool.write(request, slice(0, length))
    steps: list[tuple[list[int], list[int]]] = [
        ([0, 1, 2], [6, 31, 48]),  # made
        ([0, 1, 2], [7, 32, 49]),  # goes on
        ([0, 1, 2], [8, 33, 50]),  # into the second part
        ([2, 1], [50, 34]),  # one has ended: too few rows, made again, in another order
        ([1], [35]),
        ([1, 0], [36, 9]),  # one comes back
    ]
    for number, (requests, lengths) in enumerate(steps):
        together = pool.step(rows, query, requests, lengths)
        for place, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            alone = pool.step(decode.Rows(), query, [request], [length])[0]
            if not torch.equal(alone, together[place]):
                failures.append(f"step {number}: request {request} has other bits alone")
            if not (alone - pool.expected(query, request, length)).abs().max() < 1e-6:
                failures.append(f"step {number}: request {request} is wrong")
    # another request takes the place of request 1 with as many tokens: its row must not be taken for the old one's
    pool.tokens[1] = pool.tokens[1].flip(1)
    pool.write(1, slice(0, 36))
    rows.forget([1])
    if not (pool.step(rows, query, [1], [37])[0] - pool.expected(query, 1, 37)).abs().max() < 1e-6:
        failures.append("the row of an earlier request was used")
    # rows of ended requests are kept for a while
    decode.USED, kept = 0.0, decode.Rows()
    pool.step(kept, query, [0, 1, 2], [40, 40, 40])
    if not torch.equal(pool.step(kept, query, [2], [41]), pool.step(decode.Rows(), query, [2], [41])):
        failures.append("a row beside those of ended requests has other bits")
    return failures


def served_models() -> dict[str, Any]:
    """Models of SGLang's registry when a Qwen3 is served, and when it is asked for another one then."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
        served.choose(folder)
    from sglang.srt.models.registry import ModelRegistry

    known = {name: model.__module__ for name, model in ModelRegistry.models.items()}
    other, _ = ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])
    return {"known": known, "other": other.__module__, "all": len(ModelRegistry.models)}


def collects_garbage() -> bool:
    """Whether the server still sets the thresholds that it is given: bound_store.py turns collections off before."""
    from sglang.srt.entrypoints.engine import _set_envs_and_config

    return "gc.set_threshold(*gc_threshold)" in inspect.getsource(_set_envs_and_config)


def problems_after_a_move() -> list[str]:
    """Return the check's findings for another version, a missing name and a function with other parameters."""
    symbols.SGLANG_VERSION = "0.0.1"
    del pool_host._cuda_host_register
    sampler.multinomial_with_seed = lambda logprobs, seed: None
    return symbols.problems()


if __name__ == "__main__":
    report = {
        "collects_garbage": collects_garbage(),
        "problems": symbols.problems(),
        "hashes": hashes(),
        "draws": draws_of_stock(),
        "quick_draws": quick_draws(),
        "distribution": distribution(),
        "attention": attention_differences(),
        "decode": {narrow: decode_failures(narrow) for narrow in (0, 64)},
        "not_invariant": (invariance.enable(), invariance_failures())[1],
        "problems_after_a_move": problems_after_a_move(),
        "served": served_models(),  # last: models install what the platform replaces
    }
    print("\n" + json.dumps(report))
