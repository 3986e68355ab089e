"""The stream of prompts: fair, seeded, and resumable to the prompt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from owpo_megatron.data import ShuffledStream
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt


def _prompts(count):
    return [Prompt(id=str(n), token_ids=(n,), text=f"q{n}", answer=str(n)) for n in range(count)]


def test_an_epoch_is_a_permutation_and_the_next_another():
    stream = ShuffledStream(_prompts(50), seed=1)
    first, second = stream.take(50), stream.take(50)
    assert sorted(p.token_ids for p in first) == sorted(p.token_ids for p in second) == [(n,) for n in range(50)]
    assert first != second
    assert first == ShuffledStream(_prompts(50), seed=1).take(50) != ShuffledStream(_prompts(50), seed=2).take(50)


def test_the_order_is_pinned():
    """A change would break the resumption of runs made before it."""
    assert [p.id for p in ShuffledStream(_prompts(8), seed=1).take(10)] == list("5106732464")


@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    takes=st.lists(st.integers(0, 30), max_size=6),
    later=st.lists(st.integers(0, 30), max_size=6),
)
def test_a_resumed_stream_continues_exactly(size, seed, takes, later):
    """However it was consumed, the state survives JSON, and the order does not depend on the sizes of the takes."""
    uninterrupted = ShuffledStream(_prompts(size), seed)
    for count in takes:
        uninterrupted.take(count)
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = ShuffledStream(_prompts(size), seed)
    resumed.take(5)  # a position that loading must overwrite
    resumed.load_state_dict(state)
    for count in later:
        assert resumed.take(count) == uninterrupted.take(count)
    at_once = ShuffledStream(_prompts(size), seed)
    at_once.take(sum(takes) + sum(later))
    assert at_once.take(size) == resumed.take(size)


def test_a_state_of_other_prompts_or_another_seed_is_refused():
    state = ShuffledStream(_prompts(8), seed=1).state_dict()
    with pytest.raises(UserError, match="seed = 2: the checkpoint was made with seed 1"):
        ShuffledStream(_prompts(8), seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="data.source = 9 prompts: are not those of the checkpoint"):
        ShuffledStream(_prompts(9), seed=1).load_state_dict(state)


def test_no_prompts():
    with pytest.raises(UserError, match="at least one problem"):
        ShuffledStream([], seed=1)
