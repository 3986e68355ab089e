"""Records in every form that people have them, and every fault of one as a line with file, row and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from owpo_megatron.config import Config, DataConfig
from owpo_megatron.data import load_problems, read_problems
from owpo_megatron.data.problem import Message
from owpo_megatron.data.records import problem_of
from owpo_megatron.errors import UserError

CASES = Path(__file__).parent / "cases"
SYSTEM = {"role": "system", "content": "Use a box."}
USER = {"role": "user", "content": "1+1?"}


def read(record, columns=None):
    return problem_of(record, "f.jsonl:7", 0, columns)


# ------------------------------------------------------------------------------------------------ texts
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "d1_surrogate",
            r"d1_surrogate.jsonl:5 problem = Tom has \\ud83d 3 .*: character 9 is U\+D83D, half of a surr",
        ),
        ("d1b_surrogate_answer", r"answer.jsonl:5 answer = 7\\udc97: character 2 is U\+DC97"),
    ],
)
def test_half_a_surrogate_pair_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        list(read_problems(str(CASES / f"{name}.jsonl")))
    str(error.value).encode()  # and can be printed


@pytest.mark.parametrize("place", ["id", "domain", "messages"])
def test_so_it_is_in_every_other_text(place):
    record = {"problem": "q", "answer": "4"} | {place: "a\ud800"}
    if place == "messages":
        record = {"messages": [SYSTEM, {"role": "user", "content": "a\ud800"}], "answer": "4"}
    with pytest.raises(UserError, match=r"f.jsonl:7 .*U\+D800"):
        read(record)


def test_whole_pairs_and_controls_are_texts():
    assert read({"problem": "😀 \x00 é", "answer": "4"}).text == "😀 \x00 é"


# ------------------------------------------------------------------------------------------------ answers
def test_numbers_are_answers():
    answers = [one.answer for one in read_problems(str(CASES / "d2_float.jsonl"))]
    assert answers == ["0", "2", "4", "6", "0.5"]
    assert [one.answer for one in read_problems(str(CASES / "d14_float.parquet"))] == ["2", "0.5", "3"]


@pytest.mark.parametrize(
    ("value", "answer"),
    [(2, "2"), (2.0, "2"), (0.5, "0.5"), (-0.0, "0"), (1e-7, "0.0000001"), (1e20, "1" + "0" * 20), (180.25, "180.25"),
     (10**30, "1" + "0" * 30), (["7"], "7"), ([7.0], "7")],
)  # fmt: skip
def test_a_number_has_one_spelling(value, answer):
    assert read({"problem": "q", "answer": value}).answer == answer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "", " ", [], ["1", "2"], {"a": 1}])
def test_what_is_no_answer(value):
    with pytest.raises(UserError, match=r"f.jsonl:7 answer"):
        read({"problem": "q", "answer": value})


def test_a_column_with_a_gap_names_the_row(tmp_path):
    """pandas makes floats of it, and NaN of the gap."""
    table = pyarrow.table({"problem": ["a", "b"], "answer": [1.0, float("nan")], "id": [1.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet:2 answer = nan: is no number"):
        list(read_problems(str(tmp_path / "x.parquet")))
    assert read({"problem": "q", "answer": 1, "id": 3.0}).id == "3"
    assert read({"problem": "q", "answer": 1, "id": float("nan")}).id == "0"


# ------------------------------------------------------------------------------------------------ prompts
def test_a_conversation_keeps_its_turns():
    (first, *_) = read_problems(str(CASES / "d3_system.jsonl"))
    assert first.messages == (Message("system", "Put your answer in \\boxed{}."), Message("user", "What is 0+0?"))
    assert first.answer == "0" and first.id == "0"
    turns = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "twice that?"}]
    assert [one.role for one in read({"messages": turns, "answer": 4}).messages] == ["user", "assistant", "user"]
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
    assert read({"conversations": shared, "answer": 4}).messages == (Message("system", "s"), Message("user", "q"))
    assert read({"messages": [USER], "answer": 2}).messages == () and read({"prompt": USER, "answer": 2}).text == "1+1?"
    parts = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}
    assert read({"prompt": [parts], "answer": 2}).text == "1+1?"


def test_a_prompt_is_a_text_or_token_ids():
    texts = [one.text for one in read_problems(str(CASES / "d3_str_prompt.jsonl"))]
    assert texts == [f"What is {n}+{n}?" for n in range(4)]
    assert read({"prompt": [5, 6, 0], "answer": 4}).token_ids == (5, 6, 0)
    assert read({"token_ids": [5, 6], "answer": 4}).token_ids == (5, 6)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "must not be empty"),
        ([1, -1], "is no token id"),
        ([1, "a"], r"must be a text, a list of \{role, content\}, or a list of token ids"),
        ([{"role": "owner", "content": "q"}], "use system, user, assistant or tool"),
        ([{"role": "user", "content": None}], "must be a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only parts of type text"),
        ([USER, {"role": "assistant", "content": "2"}], "may give the answer away"),
        ([SYSTEM], "nothing is asked"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}, USER], "calls of tools"),
        (7, "must be a text"),
    ],
)
def test_what_is_no_prompt(prompt, message):
    with pytest.raises(UserError, match=f"f.jsonl:7 prompt.*{message}"):
        read({"prompt": prompt, "answer": "2"})


def test_a_reply_that_is_begun_is_marked():
    begun = {"role": "assistant", "content": "The answer is \\boxed{", "prefix": True}
    assert read({"prompt": [USER, begun], "answer": "2"}).messages[-1].continued


# ------------------------------------------------------------------------------------------------ columns, files
def test_columns_of_other_names(tmp_path):
    columns = {"problem": "question", "answer": "meta.result.value", "id": "nr", "domain": "kind"}
    record = {"question": "q", "meta": {"result": {"value": 4}}, "nr": 9, "kind": "algebra", "problem": "another"}
    one = read(record, columns)
    assert (one.id, one.text, one.answer, one.domain) == ("9", "q", "4", "algebra")
    assert read({"a.b": "q", "answer": 1}, {"problem": "a.b"}).text == "q"
    assert read({"chat": [SYSTEM, USER], "answer": 1}, {"messages": "chat"}).messages[0].role == "system"
    with pytest.raises(UserError, match=r"f.jsonl:7 data.columns.problem = question: has no column question; it has q"):
        read({"q": "x"}, {"problem": "question"})
    with pytest.raises(UserError, match=r"lacks `problem`; it has question, answer: set data.columns: {problem: quest"):
        read({"question": "x", "answer": "y"})
    with pytest.raises(UserError, match=r"set data.columns: {answer: final_answer}"):
        read({"problem": "x", "final_answer": "y"})
    table = pyarrow.table({"question": ["a"], "meta": [{"x": "5"}], "huge": ["z" * 1000]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (one,) = read_problems(str(tmp_path / "x.parquet"), columns={"problem": "question", "answer": "meta.x"})
    assert (one.text, one.answer) == ("a", "5")
    with pytest.raises(UserError, match=r"data.columns = .*`quest` is no field of a record"):
        Config.build({"model": {"path": "m"}, "data": {"source": "x.jsonl", "columns": {"quest": "q"}}})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", '\ufeff{"problem": "a", "answer": 1}\n\n{"problem": "b", "answer": 2}'),
        ("x.json", '[{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2}]'),
        ("x.json", '{"version": 1, "data": [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2}]}'),
        ("x.csv", "\ufeffproblem,answer\na,1\nb,2\n"),
        ("x.csv", "problem;answer\r\na;1\r\nb;2\r\n"),
        ("x.csv", "problem\tanswer\na\t1\nb\t2\n"),
        ("x.csv", 'problem, answer\n"a", 1\nb, 2\n'),
        ("x.jsonl", '{"problem": "a", "answer": 1, "domain": 3}\r\n{"problem": "b", "answer": 2.0}\r\n\r\n'),
    ],
)
def test_kinds_of_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for file in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert [(one.text, one.answer) for one in read_problems(str(file))] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"problem": "\xff", "answer": 1}', "x.jsonl:1 = .*is not JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1 = .*is not JSON"),
        ("x.jsonl", b'{"problem": "a", "answer": NaN}', "x.jsonl:1 answer = nan"),
        ("x.jsonl", b'{"problem": "a", "answer": 1' + b"0" * 5000 + b"}", "x.jsonl:1 = .*is not JSON"),
        ("x.jsonl", b'{"problem": "a", "answer": "1", "answer": "2"}', "x.jsonl:1 = .*'answer' is there twice"),
        ("x.jsonl", b'[\n{"problem": "a", "answer": 1}]', "x.jsonl:1 = .*list of objects over several lines .json"),
        ("x.jsonl", b'{"problem": 5, "answer": 1}', "x.jsonl:1 problem = 5: must be a text, not a number; in JSON"),
        ("x.jsonl", b'{"problem": "a", "answer": true}', "answer = True: must be a text, not true or false"),
        ("x.jsonl", b'{"problem": "a\r\x00", "answer": 1}', r"x.jsonl:1 = .*a\\x0d\\x00"),
        ("x.jsonl.gz", b"no", "cannot be unpacked by gzip: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b'{"problem": "a", "answer": 1}', mtime=0)[:-9], "cannot be unpacked by gzip"),
        ("x.txt", b"", "give `task:NAME`, a file that ends in .jsonl"),
        ("x.json", b'"a"', "must hold a list"),
        ("x.json", b"[1", "is not JSON"),
        ("x.csv", b"problem,answer\na,1,2\n", "x.csv:2 = .*more fields than the first line"),
        ("x.csv", b"problem,answer\na,\n", "x.csv:2 answer = : must be a text that is not empty"),
        ("x.csv", b"problem,answer\n\xff,1\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_a_fault_of_a_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_problems(str(tmp_path / name)))


def test_binary_columns_are_texts(tmp_path):
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": [b"a", b"\xff"], "answer": [b"1", b"2"]}), file)
    read_them = read_problems(str(file))
    assert next(read_them).answer == "1"
    with pytest.raises(UserError, match="x.parquet:2 problem = .*is not UTF-8"):
        next(read_them)


# ------------------------------------------------------------------------------------------------ repeats, ids
def test_equal_answers_in_other_spellings_are_repeats():
    problems, report = load_problems(str(CASES / "d17_contra.jsonl"))
    assert [one.answer for one in problems] == ["2", "3", r"\frac{1}{2}"]
    assert (report.repeated, report.contradictory) == (2, 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("1,000", "1000", True), ("$2$", "2.0", True), (r"\dfrac12", "0.5", True), ("(1, 2)", "(1,2.0)", True),
     (r"\text{Yes}", "Yes", True), ("x=1\n#### 1", "1", True), ("0.333", r"\frac13", False), ("1", "2", False),
     ("(1,2)", "[1,2]", False), ("4 2", "42", False), ("0.1", "10\\%", False)],
)  # fmt: skip
def test_only_equal_answers_are(tmp_path, one, other, same):
    lines = [json.dumps({"problem": "q", "answer": answer}) for answer in (one, other)] + ['{"problem":"r","answer":1}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    _, report = load_problems(str(tmp_path / "x.jsonl"))
    assert (report.repeated, report.contradictory) == ((1, 0) if same else (0, 2))


def test_rows_of_one_id_get_ids_of_their_own():
    from owpo_megatron.data import load_prompts
    from owpo_megatron.data.faults import find_faults
    from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
    from owpo_megatron.data.tokenizer import Tokenizer

    source = str(CASES / "d5_sameid.jsonl")
    prompts, report = load_prompts(DataConfig(source=source), Tokenizer(make_byte_tokenizer()))
    assert [one.id for one in prompts] == ["0", "0#2", "0#3", "0#4"]
    assert report.same_id == 3 and "3 with an id of another one" in str(report)
    assert find_faults(list(read_problems(source))).same_id == 3
