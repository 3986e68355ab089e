"""Sources, templates and the messages for faulty input. The hub is not read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from owpo_megatron.config import DataConfig
from owpo_megatron.data import load_problems, load_prompts, load_tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import UserError

DATA = Path(os.environ.get("OWPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_byte_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def _dapo_record(text, answer, index):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def _jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_both_schemas_in_jsonl(tmp_path):
    source = _jsonl(
        tmp_path / "mixed.jsonl",
        {"id": "a", "problem": "1+1?", "answer": 2, "domain": "sums", "source": "ignored"},
        "",
        {"problem": "2+2?", "answer": "4"},
        _dapo_record("3+3?", "6", "uuid-3"),
        {"messages": [{"role": "user", "content": "4+4?"}], "answer": "8"},
    )
    problems, report = load_problems(source)
    assert [(p.id, p.text, p.answer, p.domain) for p in problems] == [
        ("a", "1+1?", "2", "sums"),
        ("1", "2+2?", "4", "math"),
        ("uuid-3", "3+3?", "6", "math"),
        ("3", "4+4?", "8", "math"),
    ]
    assert (report.read, report.used, report.repeated, report.contradictory) == (4, 4, 0, 0)


def test_the_original_schema_in_parquet(tmp_path):
    path = tmp_path / "dapo.parquet"
    records = [_dapo_record(f"{n}+{n}?", str(2 * n), f"uuid-{n}") for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    problems, report = load_problems(str(path), limit=3)
    assert [(p.id, p.text, p.answer) for p in problems] == [(f"uuid-{n}", f"{n}+{n}?", str(2 * n)) for n in range(3)]
    assert (report.read, report.used) == (5, 3)


def test_repeats_and_contradictions_are_left_out_and_reported(tmp_path):
    """Worked by hand: `a` appears three times alike (two repeats), `b` with two answers (both go), `c` once."""
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("c", "3"), ("b", "4"), (" a\n", "1")]
    source = _jsonl(tmp_path / "x.jsonl", *({"id": str(i), "problem": q, "answer": r} for i, (q, r) in enumerate(rows)))
    problems, report = load_problems(source)
    assert [p.id for p in problems] == ["0", "3"]
    assert (report.read, report.repeated, report.contradictory, report.used) == (6, 2, 2, 2)
    assert report.contradictory_ids == ("1", "4")
    assert str(report) == f"{source}: 2 of 6 problems (left out: 2 repeated, 2 with contradictory answers)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"x.jsonl:2 = \{broken: is not JSON"),
        ("[1, 2]", r"x.jsonl:2 = \[1, 2\]: must be an object"),
        ('{"messages": ["q"], "answer": "4"}', r"x.jsonl:2 messages = \['q'\]: must be a text, a list of \{role"),
        ('{"problem": "q"}', r"x.jsonl:2 = .*: lacks `answer`; it has problem: add it"),
        ('{"answer": "4"}', r"x.jsonl:2 = .*: lacks `problem`; it has answer: add it"),
        ('{"problem": "", "answer": "4"}', r"x.jsonl:2 problem = : must be a text that is not empty"),
        ('{"problem": "q", "answer": null}', r"x.jsonl:2 answer = null: must be a text"),
        ('{"problem": "q", "answer": true}', r"x.jsonl:2 answer = True: must be a text"),
        ('{"prompt": "q", "reward_model": {}}', r"x.jsonl:2 = .*: lacks `reward_model.ground_truth`"),
        ('{"prompt": [{"role": "user", "content": "q"}]}', r"x.jsonl:2 = .*: lacks `answer`; it has prompt"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, line, message):
    source = _jsonl(tmp_path / "x.jsonl", {"problem": "fine", "answer": "1"}, line)
    with pytest.raises(UserError, match=message):
        load_problems(source)


def test_a_long_faulty_value_is_shortened(tmp_path):
    with pytest.raises(UserError) as caught:
        load_problems(_jsonl(tmp_path / "x.jsonl", "{" + "y" * 5000))
    assert len(str(caught.value.value)) == 80 and len(str(caught.value)) < 400


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"problem": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="x.jsonl:1 .* is not JSON"):
        load_problems(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("x.txt", b"a,b", r"give `task:NAME`, a file that ends in .jsonl, .json, .parquet, .csv \(also .gz"),
        ("empty.jsonl", b"\n", "holds no records"),
        ("x.parquet", b"this is not Parquet", "cannot be read as Parquet"),
    ],
)
def test_a_source_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_problems(str(tmp_path / name))


def test_prompts_take_the_template_and_drop_what_is_too_long(tmp_path, tokenizer):
    source = _jsonl(tmp_path / "x.jsonl", *({"problem": "q" * n, "answer": "1"} for n in (5, 11, 10, 3)))
    prompts, report = load_prompts(DataConfig(source=source, max_prompt_tokens=10, limit=2), tokenizer)
    assert [p.text for p in prompts] == ["q" * 5, "q" * 10]
    assert prompts[0].token_ids == tokenizer.encode("qqqqq")
    assert (report.too_long, report.used) == (1, 2)

    framed, _ = load_prompts(DataConfig(source=source, template="completion"), tokenizer)
    assert framed[3].text == (
        "Question: qqq\nAnswer step by step and put the final answer within \\boxed{}.\nSolution:"
    )
    with pytest.raises(UserError, match="data.template = chat: this tokenizer has no chat template"):
        load_prompts(DataConfig(source=source, template="chat"), tokenizer)
    with pytest.raises(UserError, match="data.max_prompt_tokens = 2: no prompt of .* is that short"):
        load_prompts(DataConfig(source=source, max_prompt_tokens=2), tokenizer)


def test_the_chat_template_is_the_tokenizers_own(tmp_path):
    own = make_byte_tokenizer()
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    own.save_pretrained(tmp_path)
    source = _jsonl(tmp_path / "x.jsonl", {"problem": "1+1?", "answer": "2"})
    prompts, _ = load_prompts(DataConfig(source=source, template="chat"), load_tokenizer(tmp_path))
    assert prompts[0].text == "<user>1+1?<bot>"


def test_the_test_split(tmp_path, tokenizer):
    test, _ = load_prompts(DataConfig(source="task:cipher"), tokenizer, "test", limit=7)
    assert [p.id for p in test] == [f"cipher/test/{n}" for n in range(7)] and test[0].domain == "cipher"
    source = _jsonl(tmp_path / "x.jsonl", {"problem": "q", "answer": "1"})
    with pytest.raises(UserError, match="data.eval_source = None: .* has no test split"):
        load_prompts(DataConfig(source=source), tokenizer, "test")
    held_out = _jsonl(tmp_path / "y.jsonl", {"problem": "r", "answer": "1"})
    prompts, _ = load_prompts(DataConfig(source=source, eval_source=held_out), tokenizer, "test")
    assert [p.text for p in prompts] == ["r"]


@pytest.mark.skipif(not (DATA / "dapo_math_17k.jsonl").is_file(), reason=f"no DAPO-Math-17k under {DATA}")
def test_the_real_dapo_math_17k(tokenizer):
    """16,900 texts are distinct but for white space, 15 of them appear with two answers (30 rows): counted apart
    from this code with one regular expression."""
    problems, report = load_problems(str(DATA / "dapo_math_17k.jsonl"))
    assert report.read == 17_895
    assert report.contradictory == 30 and "dapo-00035" in report.contradictory_ids
    assert len(problems) == 16_900 - 15 == report.read - report.repeated - report.contradictory
    assert problems[0].answer == "34"
    prompts, _ = load_prompts(DataConfig(source=str(DATA / "dapo_math_17k.jsonl"), limit=20), tokenizer)
    assert len(prompts) == 20


@pytest.mark.skipif(not (DATA / "dapo_schema_sample.jsonl").is_file(), reason=f"no DAPO sample under {DATA}")
def test_real_records_of_the_original_schema():
    problems, report = load_problems(str(DATA / "dapo_schema_sample.jsonl"))
    assert report.read == len(problems) == 14
    assert problems[0].id == "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079" and problems[0].answer == "34"
    assert problems[0].text.startswith("Solve the following math problem step by step.")


@pytest.mark.skipif(not (DATA / "dapo_schema_sample.jsonl").is_file(), reason=f"no DAPO sample under {DATA}")
def test_real_records_are_the_same_from_parquet(tmp_path):
    """Nested columns, as the hub's file has them."""
    records = [json.loads(line) for line in (DATA / "dapo_schema_sample.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "dapo.parquet", row_group_size=5)
    assert load_problems(str(tmp_path / "dapo.parquet"))[0] == load_problems(str(DATA / "dapo_schema_sample.jsonl"))[0]
