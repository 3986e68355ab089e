"""Several sources: domains, weights, limits, columns of their own, and a stream that goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from owpo_megatron.config import Config, DataConfig
from owpo_megatron.data import MixedStream, ShuffledStream, load_prompts, make_stream, notes_on
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError

TOKENIZER = Tokenizer(make_byte_tokenizer())


@pytest.fixture
def two(tmp_path):
    """Ten problems of one kind, four of another under other names, one of them in both."""
    ours = [{"problem": f"ours {n}", "answer": n} for n in range(10)]
    theirs = [{"question": f"theirs {n}", "result": n} for n in range(3)] + [{"question": "ours 3", "result": 3.0}]
    for name, rows in (("ours", ours), ("theirs", theirs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"problem": "question", "answer": "result"}

    def configured(**weights):
        return DataConfig(
            sources=[
                {"source": str(tmp_path / "ours.jsonl"), "weight": weights.get("ours")},
                {"source": str(tmp_path / "theirs.jsonl"), "domain": "other", "columns": columns,
                 "weight": weights.get("theirs")},
            ]
        )  # fmt: skip

    return configured


def test_sources_are_one_set_with_domains_of_their_own(two):
    """Repeats are found across them; ids stay unique."""
    prompts, report = load_prompts(two(), TOKENIZER)
    assert (report.read, report.repeated, report.used) == (14, 1, 13)
    assert Counter(prompt.domain for prompt in prompts) == {"math": 10, "other": 3}
    assert [prompt.text for prompt in prompts if prompt.source == 1] == ["theirs 0", "theirs 1", "theirs 2"]
    assert len({prompt.id for prompt in prompts}) == 13
    assert isinstance(make_stream(two(), prompts, 1), ShuffledStream)


def test_a_limit_of_one_source(two):
    data = two()
    first = data.sources[0].model_copy(update={"limit": 2})
    prompts, _ = load_prompts(data.model_copy(update={"sources": [first, data.sources[1]]}), TOKENIZER)
    assert Counter(prompt.source for prompt in prompts) == {0: 2, 1: 3}


@pytest.mark.parametrize(("ours", "theirs"), [(3, 1), (1, 1), (0.2, 0.8)])
def test_weights_are_shares_of_the_prompts_to_within_one(two, ours, theirs):
    data = two(ours=ours, theirs=theirs)
    prompts, _ = load_prompts(data, TOKENIZER)
    stream = make_stream(data, prompts, seed=4)
    assert isinstance(stream, MixedStream)
    taken = Counter()
    for count in range(1, 101):
        taken.update(prompt.source for prompt in stream.take(1))
        assert abs(taken[1] - count * theirs / (ours + theirs)) <= 1
    # each source goes through all of its problems before it repeats one
    again = make_stream(data, prompts, seed=4).take(100)
    own = [prompt.id for prompt in again if prompt.source == 1]
    assert len(set(own[:3])) == 3


def test_a_mixed_stream_goes_on_where_it_stopped(two):
    data = two(ours=2, theirs=1)
    prompts, _ = load_prompts(data, TOKENIZER)
    stream = make_stream(data, prompts, seed=4)
    stream.take(17)
    state = json.loads(json.dumps(stream.state_dict()))
    other = make_stream(data, prompts, seed=4)
    other.load_state_dict(state)
    assert other.take(20) == stream.take(20)
    changed = two(ours=1, theirs=1)
    with pytest.raises(UserError, match="use the same sources and weights"):
        make_stream(changed, prompts, seed=4).load_state_dict(state)


def test_mistakes_name_the_source(two):
    def build(**data):
        return Config.build({"model": {"path": "m"}, "data": data})

    with pytest.raises(UserError, match="give every source a weight, or none"):
        build(sources=[{"source": "a.jsonl", "weight": 1}, "b.jsonl"])
    with pytest.raises(UserError, match="data.source names another one"):
        build(source="a.jsonl", sources=["b.jsonl"])
    with pytest.raises(UserError, match=r"data.source = \(missing\): required"):
        build(template="raw")
    data = two(ours=1, theirs=1)
    prompts, _ = load_prompts(data, TOKENIZER)
    with pytest.raises(UserError, match=r"data.sources\[1\] = .*theirs.jsonl: no prompt of it is left"):
        make_stream(data, [prompt for prompt in prompts if prompt.source == 0], 1)


def test_what_a_run_says_of_its_prompts(two, tmp_path):
    """Fewer problems than a step takes, and answers that nothing equals."""
    prompts, _ = load_prompts(two(), TOKENIZER)
    config = Config.build({"model": {"path": "m"}, "data": {"source": "x"}, "rollout": {"prompts_per_step": 16}})
    (note,) = notes_on(prompts, config)
    assert "rollout.prompts_per_step = 16 is more than the 13 problems" in note
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"problem": "q", "answer": "add them up and then you see the whole of it"})
    )
    bad, _ = load_prompts(DataConfig(source=str(tmp_path / "x.jsonl")), TOKENIZER)
    small = Config.build(
        config.model_dump() | {"rollout": {"prompts_per_step": 1}, "optimizer": {"updates_per_step": 1}}
    )
    (note,) = notes_on(bad, small)
    assert note.startswith("warning: 1 of 1 answers") and "(prose)" in note
