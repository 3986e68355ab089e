"""Generated tasks: the same on every machine, divided cleanly, demonstrated as documented."""

from __future__ import annotations

import random
import re

import pytest

from owpo_megatron.data.tasks import TASKS, Cipher, Countdown, Sums, get_task
from owpo_megatron.data.tasks.base import split_of
from owpo_megatron.data.tasks.lookup import table_of
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.generated_tasks import grade_sums, sums_sound, sums_steps
from owpo_megatron.verifiers.rules import TRIVIAL_RULES


def test_first_problems_are_pinned():
    """A change of these is a change of the task: every published curve and every cached base model becomes void."""
    cipher = TASKS["cipher"].problems("train")[0]
    assert (cipher.id, cipher.text, cipher.answer) == ("cipher/train/0", "ks4sc=", "ar9ru")
    countdown = TASKS["countdown"].problems("train")[0]
    assert (countdown.text, countdown.answer) == ("6,3,4=18:", "6,3,4=18")
    lookup = TASKS["lookup"].problems("train")[0]
    assert (lookup.text, lookup.answer) == ("y+s=", "12")
    sums = TASKS["sums"].problems("train")[0]
    assert (sums.text, sums.answer) == ("38812=", "2")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_equal_calls_give_equal_problems_and_demonstrations(name):
    task = TASKS[name]
    problems = task.problems("train")
    assert problems == type(task)().problems("train")
    first = [task.demonstrate(problem, random.Random(3)) for problem in problems[:50]]
    assert first == [task.demonstrate(problem, random.Random(3)) for problem in problems[:50]]
    assert len({problem.id for problem in problems}) == len(problems)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_train_and_test_share_no_problem(name):
    def content(problem):
        numbers, _, target = problem.answer.partition("=")
        return (*sorted(numbers), target) if name == "countdown" else problem.text

    def contents(split):
        return {content(problem) for problem in TASKS[name].problems(split)}

    train, test = contents("train"), contents("test")
    assert test and not train & test


def test_an_order_of_the_numbers_cannot_cross_the_divide():
    """2,3,7=13 has six orders; all of them are in one split."""
    splits = [
        split
        for split in ("train", "test")
        for problem in Countdown().problems(split)
        if re.fullmatch(r"[237],[237],[237]=13:", problem.text) and len(set(problem.text[:5:2])) == 3
    ]
    assert len(splits) == 6 and len(set(splits)) == 1


def test_split_of_is_the_crc32_of_the_key():
    """Worked by hand: crc32(b"123456789") = 0xCBF43926 = 3421780262, the check value of the standard; 2 modulo 10."""
    assert split_of("123456789") == "train"
    assert sum(split_of(str(key)) == "test" for key in range(10_000)) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_texts_stay_in_the_alphabet_and_answers_fit(name):
    task, rng = TASKS[name], random.Random(0)
    assert len(set(task.alphabet)) == len(task.alphabet)
    for problem in task.problems("test"):
        turns = task.demonstrate(problem, rng)
        turns = [turns] if isinstance(turns, str) else turns
        assert set(problem.text + "".join(turns)) <= set(task.alphabet)
        assert len("".join(turns)) + len(turns[::2]) <= task.max_response_tokens  # every reply has its end
        assert problem.domain == name and name in TRIVIAL_RULES


def test_the_lookup_table_is_the_problems_own_and_the_demonstrator_seldom_uses_it():
    """Right by the tool 0.25 * 0.2 = 0.05, by a guess 0.75 / 20 = 0.0375, after one look never."""
    task, rng = TASKS["lookup"], random.Random(0)
    problems = task.problems("train")
    tables = {tuple(table_of(problem.id).values()) for problem in problems[:500]}
    assert len(tables) == 500
    shown = [task.demonstrate(problem, rng) for problem in problems]
    right = [turns[-1] == problem.answer for turns, problem in zip(shown, problems, strict=True)]
    asks = [len(turns) for turns in shown]
    assert asks.count(1) / len(asks) == pytest.approx(0.75, abs=0.02)
    assert asks.count(5) / len(asks) == pytest.approx(0.05, abs=0.01)
    assert sum(right) / len(right) == pytest.approx(0.0875, abs=0.013)
    assert not any(one for one, count in zip(right, asks, strict=True) if count == 3)
    for turns, problem in zip(shown, problems, strict=True):
        table, keys = table_of(problem.id), problem.text[:3:2]
        assert turns[:-1] == [part for key in keys for part in (key + "?", str(table[key]))][: len(turns) - 1]


def test_the_cipher_is_a_substitution_and_its_habit_is_always_wrong():
    task = Cipher()
    symbols = task.alphabet.removesuffix("=")
    assert sorted(task.decode(symbols)) == sorted(symbols)
    always_errs = Cipher(lowest_error=1.0, highest_error=1.0)
    never_errs = Cipher(lowest_error=0.0, highest_error=0.0)
    for problem in task.problems("test")[:100]:
        wrong = always_errs.demonstrate(problem, random.Random(0))
        assert all(given != right for given, right in zip(wrong, problem.answer, strict=True))
        assert never_errs.demonstrate(problem, random.Random(0)) == problem.answer


def test_the_demonstrator_errs_as_often_as_documented():
    """The rates are uniform on [0.05, 0.65], so 35 symbols in 100 are wrong on average."""
    task, rng = Cipher(), random.Random(0)
    pairs = [
        pair
        for problem in task.problems("train")
        for pair in zip(task.demonstrate(problem, rng), problem.answer, strict=True)
    ]
    assert sum(given != right for given, right in pairs) / len(pairs) == pytest.approx(0.35, abs=0.02)


def test_countdown_is_demonstrated_right():
    task, rng = Countdown(), random.Random(0)
    for problem in task.problems("test"):
        item = GradingItem(task.demonstrate(problem, rng), problem.answer)
        assert TRIVIAL_RULES["countdown"](item) == "ok"


def test_unknown_task():
    with pytest.raises(UserError, match="task:sudoku: no such task; known: cipher, countdown"):
        get_task("sudoku")


def test_sums_go_on_from_what_was_written_and_errors_may_cancel():
    """Each of four sums errs with 0.3. Right answers without a sound step-by-step sum exist: two errors can cancel."""
    task, rng = Sums(), random.Random(0)
    problems = task.problems("train")
    shown = [task.demonstrate(problem, rng) for problem in problems]
    graded = [
        (sums_steps(text, problem.answer, problem.text), sums_sound(text, problem.answer, problem.text))
        for text, problem in zip(shown, problems, strict=True)
    ]
    steps = sum(one["parts"]["process"] for one, _ in graded) / len(graded)
    assert steps == pytest.approx(0.7, abs=0.01)
    sound = sum(one for _, one in graded) / len(graded)
    assert sound == pytest.approx(0.7**4, abs=0.015)
    assert sum(one["correct"] and not is_sound for one, is_sound in graded) > 0.03 * len(graded)
    assert all(one["correct"] or not is_sound for one, is_sound in graded)
    never = Sums(error=0.0)
    for problem in problems[:100]:
        text = never.demonstrate(problem, rng)
        item = GradingItem(text, problem.answer, prompt=problem.text)
        assert grade_sums(item) == "ok" and sums_sound(text, problem.answer, problem.text)


@pytest.mark.parametrize(
    ("response", "reason"),
    [("7507####7", "ok"), ("####7", "ok"), ("7507####8", "wrong"), ("7507", "no_answer"), ("7507####", "no_answer")],
)
def test_the_answer_of_sums_is_behind_the_last_mark(response, reason):
    assert grade_sums(GradingItem(response, "7", prompt="34857=")) == reason
    assert grade_sums(GradingItem(response, "7", prompt="34857=", truncated=True)) == "no_answer"
    assert sums_steps(response, "7", "34857=")["correct"] == (reason == "ok")


@pytest.mark.parametrize(
    ("response", "share"), [("7507####7", 1.0), ("75####7", 0.5), ("7=07####7", 0.5), ("", 0.0), ("75071####1", 1.0)]
)
def test_steps_of_sums_by_hand(response, share):
    """3 + 4 = 7, + 8 = 15, + 5 = 10, + 7 = 7. What is no digit is no step, nor is the next; a fifth is ignored."""
    assert sums_steps(response, "7", "34857=")["parts"] == {"process": share}
