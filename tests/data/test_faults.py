"""Faults of a set and contamination: small cases worked by hand, then the real set against its known faults."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from owpo_megatron.config import Config, DataConfig
from owpo_megatron.data import load_problems, load_prompts, load_tokenizer, read_problems
from owpo_megatron.data.contamination import Contamination, held_in
from owpo_megatron.data.faults import find_faults, fold
from owpo_megatron.data.problem import Problem, letters_and_digits, words
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import UserError

DATA = Path(os.environ.get("OWPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = DATA / "dapo_math_17k.jsonl"


def problem(name: str, text: str, answer: str = "1") -> Problem:
    return Problem(name, text, answer, "math")


PROBLEMS = [
    problem("a", "Compute $x + 1$ for the least prime number x.", "3"),
    problem("b", "Compute $x + 1$  for the least prime number x. ", "3"),  # a again, but for spaces
    problem("c", "Compute \\(x + 1\\) for the least prime number x", "4"),  # a in other signs, another answer
    problem("d", "How many zeros has 20 factorial?", "12345678901234567"),
    problem("e", "How many zeros has 20  factorial?", "4"),  # contradicts d
    problem("f", "求 3 的平方", "1000000000000000"),  # 16 digits
    problem("g", "What is the largest integer?", "-123456789012345"),  # 15 digits
]


def test_every_fault_is_found_once() -> None:
    faults = find_faults(PROBLEMS)
    assert (faults.rows, faults.repeated, faults.texts, faults.problems) == (7, 1, 5, 4)
    assert [(c.ids, c.answers) for c in faults.contradictory] == [(("d", "e"), ("12345678901234567", "4"))]
    assert [c.ids for c in faults.lookalike] == [("a", "b", "c"), ("d", "e")]
    assert faults.long_answers == (("d", "12345678901234567"), ("f", "1000000000000000"))
    assert (faults.integers, faults.chinese) == (7, 1)


def test_folding_reads_a_stream_and_keeps_the_first() -> None:
    folded = fold(problem(f"{copy}/{one.id}", one.text, one.answer) for copy in range(100) for one in PROBLEMS)
    assert [one.id for one in folded.problems] == ["0/a", "0/c", "0/d", "0/e", "0/f", "0/g"]
    assert (folded.read, folded.repeated) == (700, 694)


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    records = [{"id": one.id, "problem": one.text, "answer": one.answer} for one in PROBLEMS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        ([], "abcdefg"),
        (["repeated"], "acdefg"),
        (["contradictory"], "abcfg"),
        (["repeated", "contradictory"], "acfg"),
        (["repeated", "contradictory", "lookalike"], "fg"),
        (["long_answer"], "abceg"),
    ],
)
def test_what_is_left_out_is_chosen(source: str, kinds: list[str], left: str) -> None:
    problems, report = load_problems(source, leaving_out=kinds)
    assert "".join(one.id for one in problems) == left
    counted = (report.repeated, report.contradictory, report.lookalike, report.long_answer, report.contaminated)
    assert report.read - sum(counted) == report.used == len(left)


def test_contaminated_problems_leave_training_but_not_the_evaluation_set(tmp_path: Path, source: str) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"id": "q", "problem": PROBLEMS[0].text, "answer": "3"}) + "\n")
    make_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = DataConfig(
        source=source,
        eval_source=str(held_out),
        leave_out=["repeated", "contradictory", "contaminated"],
        against=[str(held_out)],
    )
    prompts, report = load_prompts(config, tokenizer)
    assert [prompt.id for prompt in prompts] == ["f", "g"]
    assert str(report).endswith(
        "2 of 7 problems (left out: 1 repeated, 2 with contradictory answers, 2 of evaluation sets)"
    )
    assert [prompt.id for prompt in load_prompts(config, tokenizer, "test")[0]] == ["q"]


def test_nothing_left_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "q", "answer": "1"}\n{"problem": "q", "answer": "2"}\n')
    with pytest.raises(UserError, match="data.leave_out = .* leaves nothing of .*; see `owpo data check`"):
        load_problems(str(path))


@pytest.mark.parametrize("fields", [{"leave_out": ["contaminated"]}, {"against": ["aime24.jsonl"]}])
def test_contamination_needs_both_fields(fields: dict) -> None:
    with pytest.raises(UserError, match="data.against = .*go together; give both or neither"):
        Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"} | fields})


# --------------------------------------------------------------------------------------------- contamination
TWELVE = "one two three four five six seven eight nine ten eleven twelve"


def test_shares_by_hand() -> None:
    """Twelve words have the sequences 1-10, 2-11 and 3-12."""
    evaluation = problem("q", TWELVE + "?")
    train = [
        problem("same", TWELVE.upper() + "!"),
        problem("inside", f"Solve this: {TWELVE}. Give the number."),
        problem("two of three", "one two three four five six seven eight nine ten eleven dozen"),
        problem("one of three", "so two three four five six seven eight nine ten eleven then"),
        problem("none", "two one four three six five eight seven ten nine twelve eleven"),
    ]
    found = {match.train_id: (match.share, match.kind) for match in held_in("q", [evaluation], train, 0.3).matches}
    assert found == {
        "same": (1.0, "same"),
        "inside": (1.0, "inside"),
        "two of three": (0.6667, "similar"),
        "one of three": (0.3333, "similar"),
    }
    counts = held_in("q", [evaluation], train[2:], 0.5)
    assert (counts.problems, counts.same, counts.inside, counts.similar) == (1, 0, 0, 1)
    assert held_in("q", [evaluation], train[3:], 0.5).matches == ()


def test_short_problems_are_one_sequence_and_very_short_ones_none() -> None:
    short, tiny = problem("short", "How many primes are below one hundred?"), problem("tiny", "What is 2 + 2?")
    index = Contamination([short, tiny], 1.0)
    assert [m.eval_id for m in index.matches(problem("t", f"Say: {short.text} What is 2 + 2?"))] == ["short"]
    assert list(index.matches(problem("t", "How many primes are there below one hundred?"))) == []


def test_words_and_letters() -> None:
    assert words(r"Find $\frac{12}{x_1}$ 求值") == ["find", "frac", "12", "x", "1", "求", "值"]
    assert letters_and_digits("$x$ = \\(1\\), ½") == "x1½"


# --------------------------------------------------------------------------------------------- the real set
@pytest.mark.skipif(not REAL.is_file(), reason=f"no DAPO-Math-17k under {DATA}; set OWPO_TEST_DATA")
def test_the_known_faults_of_dapo_math_17k_are_found() -> None:
    """Faults that others found in it with own scripts: 30 contradictory texts, five answers beyond 15 digits, 3,432
    Chinese rows, 14 of the 83 AMC problems (8 of the 40 of 2023) letter for letter, none of AIME 2024."""
    known = json.loads((DATA / "dapo_known_faults.json").read_text())
    problems = list(read_problems(str(REAL)))
    faults = find_faults(problems)
    assert (faults.rows, faults.problems, faults.chinese) == (known["rows"], known["unique_texts"], 3432)
    assert faults.integers == faults.rows
    groups = {frozenset(row["id"] for row in group) for group in known["conflicting_gold_groups"]}
    assert {frozenset(conflict.ids) for conflict in faults.lookalike} == groups and len(groups) == 30
    assert [list(pair) for pair in faults.long_answers] == [[row["id"], row["answer"]] for row in known["long_golds"]]

    amc = held_in("amc", list(read_problems(str(DATA / "amc_aimo83.jsonl"))), problems, 0.8)
    overlap = json.loads((DATA / "dapo_amc_overlap.json").read_text())
    assert {match.eval_id for match in amc.matches if match.kind == "same"} == {row["amc"] for row in overlap}
    assert (amc.same, sum(one["amc"].startswith("amc2023") for one in overlap)) == (14, 8)
    aime = held_in("aime24", list(read_problems(str(DATA / "aime24.jsonl"))), problems, 0.5)
    assert (aime.problems, aime.matches) == (30, ())
