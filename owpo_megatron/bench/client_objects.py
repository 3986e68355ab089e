"""A response's tokens as Python objects, one per number: what the client's benchmark measures the blocks against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from owpo_megatron.types import Rollout, Sample, SampleRequest


class ObjectClient:
    """Reads /generate into tuples of numbers, with the same checks as EngineClient."""

    def __init__(self, url: str):
        self._http = httpx.Client(base_url=url, timeout=60.0, trust_env=False)

    def generate(self, body: dict[str, Any], request: SampleRequest, vocab_size: int) -> Rollout:
        answer = self._http.post("/generate", content=json.dumps(body)).json()
        meta = answer["meta_info"]
        pairs = [(float(logp), int(token)) for logp, token, *_ in meta["output_token_logprobs"]]
        ids, logps = tuple(token for _, token in pairs), tuple(logp for logp, _ in pairs)
        assert list(ids) == [int(token) for token in answer["output_ids"]]
        assert min(ids) >= 0 and max(ids) < vocab_size and all(-200.0 <= logp <= 1e-3 for logp in logps)
        return Rollout(
            request.prompt, ids, logps, int(meta["weight_version"]), meta["finish_reason"]["type"], request.seed
        )

    def close(self) -> None:
        self._http.close()


def pack(samples: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
    """Tokens, targets, positions, mask and the engine's log-probs of one pack, [T] each."""
    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    mask: list[bool] = []
    logps: list[float] = []
    for sample in samples:
        ids = (*sample.prompt_ids, *sample.response_ids)
        tokens.extend(ids[:-1])
        targets.extend(ids[1:])
        positions.extend(range(len(ids) - 1))
        prompt = len(sample.prompt_ids) - 1
        mask.extend([False] * prompt + [True] * len(sample.response_ids))
        logps.extend([0.0] * prompt + list(sample.behaviour_logp))
    return tuple(torch.tensor(numbers) for numbers in (tokens, targets, positions, mask, logps))


def save(path: Any, rollouts: Sequence[Rollout]) -> None:
    """A JSON line per rollout, tokens included."""
    with open(path, "w", encoding="utf-8") as file:
        for rollout in rollouts:
            plain = vars(rollout) | {"prompt": vars(rollout.prompt)}
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
