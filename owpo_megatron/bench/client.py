"""Cost of a step's tokens for global rank 0, from the engines to the packs: CPU seconds and bytes.

A server in a process of its own answers /generate with recorded bodies, as fast as it is asked; all seconds are CPU
seconds of this process. Each work is measured with tokens in blocks of memory (the product) and with an object per
number (client_objects.py). Not covered: detokenising for the verifier, a network.

Requests in flight are a row of their own: so many that wait for each other at the server, with short answers.

Legend: L tokens of one response.
"""

from __future__ import annotations

import json
import pickle
import random
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.bench import client_objects
from owpo_megatron.bench.answer_server import answer_server
from owpo_megatron.bench.client_workers import by_a_worker
from owpo_megatron.engine.client import EngineClient, EngineGone
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.generation import Generation
from owpo_megatron.engine.recorded import load_rollouts, save_rollouts
from owpo_megatron.mcore.packing import build_microbatch, token_batch
from owpo_megatron.types import Finished, Prompt, Rollout, Sample, SampleRequest, Sampling, TokenIds, TokenValues

VOCAB = 151_936
CONCURRENCY = 8
SHORT = 64  # tokens of a response where many are in flight


def made_rollouts(count: int, tokens: int) -> list[Rollout]:
    """Random responses of this length to prompts of 200 tokens."""
    rng = random.Random(0)
    prompt = Prompt("bench/0", tuple(rng.randrange(VOCAB) for _ in range(200)), "", "1")
    return [
        Rollout(
            prompt,
            TokenIds([rng.randrange(VOCAB) for _ in range(tokens)]),
            TokenValues([-rng.expovariate(3.0) for _ in range(tokens)]),
            policy_version=1,
            finish_reason="stop",
            seed=seed,
        )
        for seed in range(count)
    ]


def recorded_rollouts(file: Path, count: int) -> list[Rollout]:
    """The first rollouts of a run's rollouts/step_N.jsonl that an engine sampled."""
    return [one for one in load_rollouts(file) if one.behaviour_logp][:count]


def bench_client(rollouts: Sequence[Rollout], log: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per work and kind of tokens; the rollouts of both kinds are equal."""
    blocks = [
        replace(one, response_ids=TokenIds(one.response_ids), behaviour_logp=TokenValues(one.behaviour_logp))
        for one in rollouts
    ]
    objects = [
        replace(one, response_ids=tuple(one.response_ids), behaviour_logp=tuple(one.behaviour_logp)) for one in blocks
    ]
    rows = []
    with answer_server([_body(one) for one in blocks]) as url, tempfile.TemporaryDirectory() as scratch:
        for work, measure in _works(url, Path(scratch)).items():
            for kind, given in (("objects", objects), ("blocks", blocks)):
                log(f"{work}, {kind}")
                rows.append({"work": work, "tokens_as": kind} | measure(given, kind == "blocks"))
        log("request by a worker")
        with closing(_client(url)) as client:
            asked = by_a_worker(client, blocks, Path(scratch))
        rows.append({"work": "request by a worker", "tokens_as": "blocks"} | asked)
    return rows


def bench_in_flight(count: int, log: Callable[[str], None], rounds: int = 2) -> dict[str, Any]:
    """A row: what `rounds` times `count` requests cost, of which `count` are always in flight."""
    rollouts = made_rollouts(8, SHORT)
    threads: list[int] = []
    with answer_server([_body(one) for one in rollouts], together=count) as url, closing(EngineClient(url)) as client:
        log(f"{count} requests in flight")
        asked = [SampleRequest(rollouts[0].prompt, index) for index in range(rounds * count)]
        took, drawn = _cpu_seconds(
            lambda: _drawn(client, asked, SHORT, count, lambda first, some: threads.append(threading.active_count()))
        )
    assert [one.response_ids for one in drawn[:8]] == [one.response_ids for one in rollouts], "as made"
    costs = _cost(took, drawn)
    return {"work": "in_flight", "tokens_as": "blocks"} | costs | {"requests": count, "threads": max(threads)}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds per response by work, of the product."""
    named = {row["work"].replace(" ", "_"): row for row in rows if row["tokens_as"] == "blocks"}
    return {
        f"{work}_ms_per_response": row["ms_per_response"] for work, row in named.items() if "ms_per_response" in row
    }


def _works(url: str, scratch: Path) -> dict[str, Callable[[Sequence[Rollout], bool], dict[str, Any]]]:
    def requests(rollouts: Sequence[Rollout], blocks: bool) -> dict[str, Any]:
        sampling = Sampling(max(len(one.response_ids) for one in rollouts))
        asked = [SampleRequest(one.prompt, index) for index, one in enumerate(rollouts)]
        ours, theirs = _client(url), client_objects.ObjectClient(url)

        def draw(requests: Sequence[SampleRequest]) -> list[Rollout]:
            if blocks:
                return _drawn(ours, requests, sampling.max_tokens, CONCURRENCY)
            with ThreadPoolExecutor(CONCURRENCY) as threads:
                return list(
                    threads.map(lambda one: theirs.generate(generate_body([one], sampling), one, VOCAB), requests)
                )

        draw(asked[:1])
        begin = time.perf_counter()
        took, drawn = _cpu_seconds(lambda: draw(asked))
        seconds = time.perf_counter() - begin
        assert [one.response_ids for one in drawn] == [one.response_ids for one in rollouts], "as recorded"
        ours.close()
        theirs.close()
        return _cost(took, rollouts) | {"responses_per_s": len(rollouts) / seconds}

    def packing(rollouts: Sequence[Rollout], blocks: bool) -> dict[str, Any]:
        samples = [
            Sample(one.prompt.token_ids, one.response_ids, 1.0, True, one.behaviour_logp, reward=1.0)
            for one in rollouts
        ]

        def pack(sample: Sample) -> Any:
            if not blocks:
                return client_objects.pack([sample])
            return token_batch([sample], build_microbatch([sample], [0], 1, torch.device("cpu")))

        pack(samples[0])
        return _cost(_cpu_seconds(lambda: [pack(one) for one in samples])[0], rollouts)

    def broadcast(rollouts: Sequence[Rollout], blocks: bool) -> dict[str, Any]:
        packed = pickle.dumps(list(rollouts))
        took, _ = _cpu_seconds(lambda: pickle.loads(pickle.dumps(list(rollouts))))
        return _cost(took, rollouts) | {"bytes_per_token": len(packed) / _tokens(rollouts)}

    def saving(rollouts: Sequence[Rollout], blocks: bool) -> dict[str, Any]:
        folder = scratch / ("blocks" if blocks else "objects")
        folder.mkdir()
        save = save_rollouts if blocks else client_objects.save
        took, _ = _cpu_seconds(lambda: save(folder / "step_000001.jsonl", rollouts))
        size = sum(file.stat().st_size for file in folder.iterdir())
        return _cost(took, rollouts) | {"bytes_per_token": size / _tokens(rollouts)}

    def memory(rollouts: Sequence[Rollout], blocks: bool) -> dict[str, Any]:
        packed = pickle.dumps(list(rollouts[:8]))
        tracemalloc.start()
        kept = pickle.loads(packed)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return {"bytes_per_token": size / _tokens(kept)}

    return {"request": requests, "pack": packing, "broadcast": broadcast, "save": saving, "memory": memory}


def _client(url: str) -> EngineClient:
    client = EngineClient(url)
    client.vocab_size = VOCAB
    return client


def _drawn(
    client: EngineClient,
    requests: Sequence[SampleRequest],
    tokens: int,
    concurrency: int,
    finished: Finished | None = None,
) -> list[Rollout]:
    """Draw as a fleet does, with a request for each response."""

    def lost(engine: int, error: EngineGone) -> None:
        raise error

    return Generation(
        [client],
        requests,
        Sampling(tokens),
        samples_per_post=1,
        concurrency=concurrency,
        give_up=lambda engine: None,
        bring_back=lost,
        finished=finished,
    ).run()


def _cost(seconds: float, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    return {
        "ms_per_response": seconds / len(rollouts) * 1e3,
        "cpu_s_per_million_tokens": seconds / _tokens(rollouts) * 1e6,
    }


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(one.response_ids) for one in rollouts)


def _cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of this process with all its threads, the result)."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def _body(rollout: Rollout) -> bytes:
    """The answer of SGLang 0.5.21 to a request for this response."""
    triples = [[logp, token, None] for logp, token in zip(rollout.behaviour_logp, rollout.response_ids, strict=True)]
    meta = {"finish_reason": {"type": rollout.finish_reason}, "weight_version": str(rollout.policy_version)}
    answer = {"output_ids": list(rollout.response_ids), "meta_info": meta | {"output_token_logprobs": triples}}
    return json.dumps(answer, separators=(",", ":")).encode()
