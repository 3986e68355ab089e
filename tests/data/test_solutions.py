"""Solutions and hints of records, and what sampling methods make of them: prompts with help, responses of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from owpo_megatron.config import DataConfig
from owpo_megatron.data import Tokenizer, load_prompts, load_solutions, load_tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Rollout

RECORDS = [
    {
        "id": "a",
        "problem": "1+1?",
        "answer": "2",
        "solution": r"One and one: \boxed{2}",
        "hints": ["count", "count to 2"],
    },
    {"id": "b", "problem": "2+2?", "answer": "4"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    own = make_byte_tokenizer()
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    own.save_pretrained(folder)
    return load_tokenizer(folder)


def source(folder: Path, *records: dict) -> str:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records or RECORDS))
    return str(file)


def test_help_is_read_where_a_record_has_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=source(tmp_path), template="chat")
    (first, second), _ = load_prompts(data, tokenizer)
    found = load_solutions(data, tokenizer, 64, None)
    assert found.solutions(first) == (r"One and one: \boxed{2}",) and found.hints(first) == ("count", "count to 2")
    assert found.solutions(second) == found.hints(second) == ()
    found.check("luffy")


def test_a_hint_stands_after_the_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=source(tmp_path), template="chat")
    prompt = load_prompts(data, tokenizer)[0][0]
    hinted = load_solutions(data, tokenizer, 64, None).hinted(prompt, "count", "Hint: ")
    assert hinted.text == "<user>1+1?\n\nHint: count<bot>" and hinted.prefix == 0
    assert (hinted.id, hinted.answer, hinted.domain) == (prompt.id, prompt.answer, prompt.domain)


def test_with_a_raw_prompt_a_hint_begins_the_response(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=source(tmp_path))
    prompt = load_prompts(data, tokenizer)[0][0]
    hinted = load_solutions(data, tokenizer, 64, None).hinted(prompt, "so", "Hint: ")
    assert hinted.token_ids == prompt.token_ids + tokenizer.encode("so") and hinted.prefix == 2


def test_an_experts_response_ends_or_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=source(tmp_path))
    prompt = load_prompts(data, tokenizer)[0][0]
    whole = load_solutions(data, tokenizer, 64, None).expert(prompt, "yes")
    assert whole.response_ids == (*tokenizer.encode("yes"), tokenizer.eos_ids[0]) and whole.finish_reason == "stop"
    cut = load_solutions(data, tokenizer, 2, None).expert(prompt, "yes")
    assert cut.response_ids == tokenizer.encode("ye") and cut.finish_reason == "length"
    assert (whole.origin, whole.behaviour_logp) == ("expert", ())


def test_the_reference_answer_in_place_of_ones_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=source(tmp_path))
    prompt = load_prompts(data, tokenizer)[0][0]
    solutions = load_solutions(data, tokenizer, 64, None)

    def told(text: str) -> tuple[str, str, str] | None:
        ids = tokenizer.encode(text)
        pair = solutions.answered(Rollout(prompt, ids, (0.0,) * len(ids), 0, "stop", 1))
        if pair is None:
            return None
        whole, bare = (tokenizer.decode(one.prompt.token_ids).removeprefix(prompt.text) for one in pair)
        assert pair[0].response_ids == pair[1].response_ids == tokenizer.encode("2")
        return whole, bare, tokenizer.decode(pair[0].response_ids)

    assert told(r"I think \boxed{7}.") == ("I think \\boxed{", "\\boxed{", "2")
    assert told("First 3. The answer is 9") == ("First 3. The answer is ", "answer is ", "2")
    assert told("no idea") is None
    after = solutions.answer_after(prompt, r"One and one: \boxed{2}")
    assert after is not None and tokenizer.decode(after.prompt.token_ids) == prompt.text + "One and one: \\boxed{"
    assert solutions.answer_after(prompt, "nothing") is None


def test_a_generated_task_has_its_answers(tokenizer: Tokenizer) -> None:
    data = DataConfig(source="task:cipher", limit=2)
    prompt = load_prompts(data, tokenizer)[0][0]
    found = load_solutions(data, tokenizer, 8, None)
    assert found.solutions(prompt) == (prompt.answer,)
    assert found.hints(prompt) == tuple(prompt.answer[:count] for count in (1, 2, 3, 4))


def test_mistakes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = DataConfig(source=source(tmp_path, RECORDS[1]))
    with pytest.raises(UserError, match="algorithm.name = luffy: needs `solution` or `hints`"):
        load_solutions(bare, tokenizer, 8, None).check("luffy")
    wrong = DataConfig(source=source(tmp_path, RECORDS[0] | {"hints": [3]}))
    with pytest.raises(UserError, match="problems.jsonl:1 hints"):
        load_solutions(wrong, tokenizer, 8, None)
    tokens = {"id": "t", "token_ids": [5, 6], "answer": "2", "solution": "x"}
    data = DataConfig(source=source(tmp_path, tokens))
    with pytest.raises(UserError, match="a tokenized prompt cannot take a hint"):
        load_solutions(data, tokenizer, 8, None).hinted(load_prompts(data, tokenizer)[0][0], "x")
