"""Cost of responses for global rank 0 where a rollout worker asks for them, and for the worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.types import Rollout, SampleRequest, Sampling
from owpo_megatron.workers import WorkerPool, WorkerProcess

START_SECONDS = 120.0


def by_a_worker(client: EngineClient, rollouts: Sequence[Rollout], scratch: Path) -> dict[str, Any]:
    """CPU milliseconds per response, of this process and of a worker that grades nothing; responses per second.

    Args:
        client: leads to a server that answers with these rollouts.
    """
    sampling = Sampling(max(len(one.response_ids) for one in rollouts))
    pool = WorkerPool("127.0.0.1", 1)
    process = WorkerProcess(0, pool.address, pool.key, scratch / "worker.log")
    try:
        pool.wait(START_SECONDS)
        requests = [SampleRequest(one.prompt, index) for index, one in enumerate(rollouts)]
        pool.submit(client, requests[:1], sampling).result()  # what is imported with the first answer
        worker = psutil.Process(process.process.pid)
        begin, ours, theirs = time.perf_counter(), time.process_time(), sum(worker.cpu_times()[:2])
        posts = [pool.submit(client, [request], sampling) for request in requests]
        drawn = [post.result()[0] for post in posts]
        seconds, ours = time.perf_counter() - begin, time.process_time() - ours
        theirs = sum(worker.cpu_times()[:2]) - theirs
    finally:
        pool.close()
        process.close()
    assert [one.response_ids for one in drawn] == [one.response_ids for one in rollouts], "as recorded"
    tokens = sum(len(one.response_ids) for one in rollouts)
    return {
        "ms_per_response": ours / len(rollouts) * 1e3,
        "cpu_s_per_million_tokens": ours / tokens * 1e6,
        "worker_ms_per_response": theirs / len(rollouts) * 1e3,
        "responses_per_s": len(rollouts) / seconds,
    }
