"""Evaluation sets: names, files, prompts; multiple choice with its seeded order."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from owpo_megatron.config import Config, SetConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.choices import Choice, as_problem, choice_of, option_order
from owpo_megatron.evaluation.prepare import INSTRUCTION, prepare, read_problems
from owpo_megatron.evaluation.sets import (
    HELD_OUT,
    SETS,
    VARIABLE,
    EvalSet,
    check_sets,
    data_folder,
    narrowed,
    resolve,
    sets_of_run,
    source_of,
)

DATA = Path(os.environ.get("OWPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SAMPLE = DATA / "mmlu_pro_sample.jsonl"
GPQA: dict[str, str] = {
    "Record ID": "rec1",
    "Question": " Which of these is made up [title] Really? ",
    "Correct Answer": " all of it\n",
    "Incorrect Answer 1": "half of it",
    "Incorrect Answer 2": "a third of it",
    "Incorrect Answer 3": "none of it",
}
MMLU: dict[str, Any] = {
    "question_id": 70,
    "question": "How many sides has a square?",
    "options": ["3", "4", "N/A", "5"],
    "answer": "B",
    "answer_index": 1,
    "category": "maths",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_byte_tokenizer())


def config(**evaluation: Any) -> Config:
    return Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}, "eval": evaluation})


# ------------------------------------------------------------------------------------------------ names and places
def test_the_papers_protocol() -> None:
    """Appendix B.5: T = 1.0 and top-p 0.7; 32 samples, Pass@1 and Pass@16; 8 samples, mean accuracy."""
    for name in ("aime24", "aime25", "amc"):
        assert (SETS[name].samples, SETS[name].pass_at) == (32, (1, 16))
    for name in ("gpqa", "mmlu_pro"):
        assert (SETS[name].samples, SETS[name].pass_at) == (8, (1,))
    assert {(one.temperature, one.top_p) for one in SETS.values()} == {(1.0, 0.7)}
    assert [name for name, one in SETS.items() if one.confidential] == ["gpqa"]


def test_a_set_takes_what_the_configuration_changes() -> None:
    less = resolve(SetConfig(name="aime24", samples=8))
    assert (less.samples, less.pass_at, less.rule) == (8, (1,), "math")
    mine = resolve(SetConfig(name="mine", source="a.jsonl", samples=4, pass_at=[1, 4], rule="gsm8k"))
    assert (mine.title, mine.samples, mine.pass_at, mine.rule) == ("mine", 4, (1, 4), "gsm8k")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"name": "aime99"}, "no such set; known: aime24"),
        ({"name": "aime24", "samples": 4, "pass_at": [16]}, "cannot exceed its samples = 4"),
    ],
)
def test_mistakes_in_a_set(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve(SetConfig.model_validate(wanted))


def test_the_sets_of_a_run_with_the_deciding_one_first() -> None:
    (own,) = sets_of_run(config(samples=4, pass_at=[1, 2], limit=7).eval, "auto")
    assert (own.name, own.samples, own.pass_at, own.limit, own.instruction) == (HELD_OUT, 4, (1, 2), 7, "none")
    named = sets_of_run(config(sets=["amc", {"name": "aime24", "samples": 16}], primary="aime24").eval, "auto")
    assert [one.name for one in named] == ["aime24", "amc"] and named[0].samples == 16


def test_a_set_is_found_in_the_folder_then_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aime24.parquet").touch()
    assert source_of(SETS["aime24"], tmp_path) == str(tmp_path / "aime24.parquet")
    (tmp_path / "aime24.jsonl").touch()
    assert source_of(SETS["aime24"], tmp_path) == str(tmp_path / "aime24.jsonl")
    assert source_of(SETS["aime25"], tmp_path) == "hub:yentinglin/aime_2025"
    assert source_of(resolve(SetConfig(name="aime24", source="x.csv")), tmp_path) == "x.csv"
    with pytest.raises(UserError, match=r"has none of amc23.jsonl, amc23.json, .*; name its file: --set am"):
        source_of(SETS["amc23"], tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert data_folder(None) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such folder"):
        data_folder(None)
    assert data_folder(tmp_path) == tmp_path


def test_a_run_hears_of_missing_sets_before_it_starts(tmp_path: Path) -> None:
    check_sets(config().eval)
    (tmp_path / "amc23.jsonl").touch()
    check_sets(config(sets=["amc23", {"name": "mine", "source": "task:cipher"}], data_dir=str(tmp_path)).eval)
    with pytest.raises(UserError, match="source of mine = gone.jsonl: no such file"):
        check_sets(config(sets=[{"name": "mine", "source": "gone.jsonl"}]).eval)


# ------------------------------------------------------------------------------------------------ prompts
def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_problems_become_prompts_of_a_domain_of_their_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", *({"id": f"q{i}", "problem": f"{i} + 1?", "answer": i + 1} for i in range(3)))
    spec = resolve(SetConfig(name="mine", source=source, limit=2))
    ready = prepare(spec, source, PromptTemplate("completion", tokenizer), seed=0)
    assert [prompt.answer for prompt in ready.prompts] == ["1", "2"] and ready.prompts[0].id == "q0"
    assert ready.prompts[0].text.startswith("Question: 0 + 1?") and "boxed" in ready.prompts[0].text
    assert ready.prompts[0].token_ids == tokenizer.encode(ready.prompts[0].text)
    assert ready.rules == {"eval/mine/math": "math"}
    other = prepare(spec, source, PromptTemplate("raw", tokenizer), seed=0)
    assert other.prompts[0].text == "0 + 1?" and other.fingerprint != ready.fingerprint


def test_chat_says_how_to_answer_unless_the_text_does(tmp_path: Path) -> None:
    backend = make_byte_tokenizer()
    backend.chat_template = "<{{ messages[0].content }}>"
    source = write(
        tmp_path / "a.jsonl",
        {"problem": "2 + 2?", "answer": "4"},
        {"problem": "Write Answer: and the sum of 2 and 3.", "answer": "5"},
    )
    spec = resolve(SetConfig(name="mine", source=source))
    texts = [
        prompt.text for prompt in prepare(spec, source, PromptTemplate("chat", Tokenizer(backend)), seed=0).prompts
    ]
    assert texts == [f"<2 + 2?\n\n{INSTRUCTION}>", "<Write Answer: and the sum of 2 and 3.>"]


def test_the_instruction_of_a_set_can_be_chosen(tmp_path: Path) -> None:
    """`dapo` has the sentences of the training prompts, letter for letter; a set's own choice comes first."""
    backend = make_byte_tokenizer()
    backend.chat_template = "{{ messages[0].content }}"
    template = PromptTemplate("chat", Tokenizer(backend))
    question = "What is 3 + 4?"
    trained = (  # as in the records of DAPO-Math-17k
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 3 + 4?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    source = write(tmp_path / "a.jsonl", {"problem": question, "answer": "34"})
    for common, own, expected in (
        ("dapo", None, trained),
        ("dapo", "none", question),
        ("boxed", None, f"{question}\n\n{INSTRUCTION}"),
        ("none", "dapo", trained),
    ):
        wants = config(instruction=common).eval
        spec = resolve(SetConfig(name="mine", source=source, instruction=own), wants)  # type: ignore[arg-type]
        assert [prompt.text for prompt in prepare(spec, source, template, seed=0).prompts] == [expected]


def test_repeated_records_are_folded_with_a_note(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """DAPO's file of AIME 2024 has every problem 32 times; equal texts with another answer are different problems."""
    one, two = {"problem": "1 + 1?", "answer": "2"}, {"problem": "1 + 1?", "answer": "10"}
    source = write(tmp_path / "aime24.jsonl", *[one] * 32, two)
    ready = prepare(SETS["aime24"], source, PromptTemplate("raw", tokenizer), 0)
    assert [prompt.answer for prompt in ready.prompts] == ["2", "10"] and ready.repeats == 31
    repeated = f"{source}: 31 records repeat others and are left out"
    assert ready.complaint == f"{repeated}; {source} has 2 problems; AIME24 has 30"
    spec = resolve(SetConfig(name="mine", source=source, limit=2))
    assert len(prepare(spec, source, PromptTemplate("raw", tokenizer), 0).prompts) == 2


def test_a_set_of_another_size_is_noted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "aime24.jsonl", {"problem": "1?", "answer": "1"})
    assert (
        prepare(SETS["aime24"], source, PromptTemplate("raw", tokenizer), 0).complaint
        == f"{source} has 1 problems; AIME24 has 30"
    )
    assert (
        prepare(resolve(SetConfig(name="aime24", limit=1)), source, PromptTemplate("raw", tokenizer), 0).complaint
        is None
    )


def test_whole_numbers_that_are_floats_in_the_hubs_amc(tmp_path: Path) -> None:
    file = tmp_path / "amc.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 0, "problem": "?", "answer": 142.0}]), file)
    assert read_problems(str(file), seed=0)[0].answer == "142"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.txt", "ends in .jsonl, .json, .parquet, .csv"),
        ("b.jsonl", "no such file"),
        ("empty.jsonl", "contains no records"),
    ],
)
def test_faulty_sources(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=said):
        read_problems(str(tmp_path / source), seed=0)


# ------------------------------------------------------------------------------------------------ multiple choice
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_gpqas_schema(kind: str, tmp_path: Path) -> None:
    """A made-up record in GPQA's fields; the id is a hash, the text is cleaned, the answer's letter is its option's."""
    file = tmp_path / f"gpqa_diamond.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(GPQA))
            writer.writeheader()
            writer.writerow(GPQA)
    elif kind == "jsonl":
        write(file, GPQA)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GPQA]), file)
    (problem,) = read_problems(str(file), seed=3)
    assert problem.text.startswith("Which of these is made up. Really?\n\n(A) ")
    assert f"({problem.answer}) all of it\n" in problem.text and problem.domain == "multiple_choice"
    assert problem.id == choice_of(GPQA, "").id and len(problem.id) == 16 and "rec1" not in problem.id


def test_mmlu_pros_schema(tmp_path: Path) -> None:
    """Padding options go, and the answer follows them."""
    choice = choice_of(MMLU, "here")
    assert choice == Choice("70", "How many sides has a square?", ("3", "4", "5"), right=1)
    named = {name: value for name, value in MMLU.items() if name not in ("question_id", "question", "answer_index")}
    named |= {"id": "mmlu_pro-70", "problem": MMLU["question"]}
    assert choice_of(named, "here") == Choice("mmlu_pro-70", choice.question, choice.options, right=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer_index": 2}, "index or the letter of one of its options"),
        ({"answer_index": None, "answer": "no"}, "index or the letter of one of its options"),
        ({"options": ["1", "1"], "answer_index": 0}, "all different"),
        ({"options": "1 or 2"}, "list of texts"),
        ({"question": ""}, "non-empty text"),
    ],
)
def test_faulty_questions_are_refused_without_showing_them(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        choice_of(MMLU | changes, "file:7")
    assert "file:7" in str(caught.value) and "square" not in str(caught.value)


def test_the_order_of_options_is_the_same_everywhere() -> None:
    """Recorded once: a pure function of seed and id, so that scores of two machines are of the same questions."""
    assert option_order(0, "70", 4) == [3, 0, 1, 2]
    assert option_order(3, "abc", 5) == [2, 4, 0, 1, 3]
    assert len({tuple(option_order(seed, "70", 4)) for seed in range(20)}) > 5


def test_every_order_of_options_is_equally_likely() -> None:
    """Chi-square over the 24 orders of 4 options, 24,000 questions; 99.9 % of 23 degrees of freedom is 49.7."""
    orders = Counter(tuple(option_order(1, f"q{index}", 4)) for index in range(24_000))
    assert len(orders) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 49.7
    letters = Counter(as_problem(Choice(f"q{i}", "?", tuple("abcde"), right=0), seed=2).answer for i in range(5000))
    assert all(abs(letters[letter] - 1000) < 120 for letter in "ABCDE")


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"no {SAMPLE}; set OWPO_TEST_DATA")
def test_the_real_sample_of_mmlu_pro() -> None:
    file = SAMPLE
    problems = read_problems(str(file), seed=0)
    assert len(problems) == 140
    records = [json.loads(text) for text in file.read_text().splitlines()]
    for record, problem in zip(records, problems, strict=True):
        right = record["options"][record["answer_index"]].strip()
        assert f"({problem.answer}) {right}\n" in problem.text


def test_a_runs_own_sets_with_fewer_samples_and_problems() -> None:
    """The sets of `owpo eval --run DIR --samples 4 --limit 20`."""
    own = EvalSet("held_out", "held out", 8, (1, 8), limit=100)
    fewer = narrowed(own, 4, 20)
    assert (fewer.samples, fewer.pass_at, fewer.limit) == (4, (1,), 20)
    assert narrowed(own, None, None) == own


@pytest.mark.parametrize("field", ["question", "options"])
def test_half_a_surrogate_pair_names_its_place_without_the_text(field: str) -> None:
    record = {"question": "q?", "options": ["1", "2"], "answer_index": 0, "question_id": 7}
    record[field] = "q \ud83d" if field == "question" else ["1", "2\ud83d"]
    with pytest.raises(UserError, match=rf"set:3 {field} = U\+D83D: character \d is half of a surrogate pair"):
        choice_of(record, "set:3")
