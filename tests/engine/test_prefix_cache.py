"""A later turn with and without the earlier ones in the server's cache: the same bits."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from owpo_megatron.engine import Fleet
from owpo_megatron.engine.client import generate_body
from owpo_megatron.types import Prompt, SampleRequest, Sampling

pytestmark = pytest.mark.slow
SAMPLING = Sampling(24, stop_token_ids=(2,))
OPENING = tuple(3 + 7 * place % 90 for place in range(40))
SHOWN = (11, 12, 13, 14)


def empty_cache(fleet: Fleet) -> None:
    """Empty it as a push of weights does: a server that has just answered may still refuse to drop its cache."""
    fleet.clients[0].pause()
    fleet.clients[0].flush()
    fleet.clients[0].resume()


def drawn(fleet: Fleet, context: tuple[int, ...], seed: int) -> tuple[list[int], list[float], int]:
    """(tokens, log-probs, tokens of the context that the server had)"""
    body = generate_body([SampleRequest(Prompt("p", context, "", ""), seed)], SAMPLING)
    with httpx.Client(trust_env=False, timeout=120) as client:
        answer: Any = client.post(f"{fleet.clients[0].url}/generate", json=body, headers=fleet.clients[0]._headers)
    found = answer.json()
    values = found["meta_info"]["output_token_logprobs"]
    return [token for _, token, *_ in values], [logp for logp, *_ in values], found["meta_info"]["cached_tokens"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_turn_is_the_same_with_and_without_the_cache(engine: Fleet, seed: int) -> None:
    empty_cache(engine)
    first, _, cached = drawn(engine, OPENING, seed)
    assert not cached
    context = (*OPENING, *first, *SHOWN)
    with_cache = drawn(engine, context, seed + 100)
    empty_cache(engine)
    without = drawn(engine, context, seed + 100)
    assert with_cache[2] >= len(OPENING) and not without[2]
    assert with_cache[:2] == without[:2]
