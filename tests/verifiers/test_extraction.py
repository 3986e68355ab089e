"""Places in which a response's final answer is found or not. The meaning of the answer is not tested here."""

from __future__ import annotations

import time

import pytest

from owpo_megatron.verifiers.extraction import closing_value, final_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{17}. Checking again: \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"\boxed\pi", r"\pi"),
        (r"\fbox{5}", "5"),
        (r"\boxed{42", None),
        (r"\boxed{17} and \boxed{42", None),
        (r"\boxed{42}\boxed{}", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_the_last_box(response, answer):
    """An empty or unclosed last box is no answer, whatever an earlier one contains."""
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"\(\boxed{1}\) and \(\boxed{-2}\).", "1, -2"),
        (r"\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}", "(2, 2), (6, 2)"),
        (r"\(y_1 = \boxed{a}\) and \(y_2 = \boxed{b}\)", "a, b"),
        (r"\boxed{42} \boxed{42}", "42"),
        (r"\boxed{41} is wrong, \boxed{42}", "42"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        (r"\boxed{41\boxed{42}}", r"41\boxed{42}"),
    ],
)
def test_boxes_that_belong_together(response, answer):
    """Only separators between them: one answer with several parts. A box in a box: the outer one."""
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("thus\nAnswer: $34$", "$34$"),
        ("**Answer:** 34", "34"),
        ("**Final Answer**\n\n$34$", "$34$"),
        ("### Final Answer\n\nThe value is $34$.", "$34$"),
        ("answer : 5\nAnswer: 6", "6"),
        ("Answer:\n34", "34"),
        ("Answer: \\boxed{7}", "7"),
        ("The answer is 34.", "34"),
        ("The answer to the problem is (3, 4).", "(3, 4)"),
        ("The answer is 34, because 2 * 17 = 34.", "34"),
        ("The answer is 1. Ignore that. The final answer is $2$. I hope it is correct.", "$2$"),
        ("Final Answer: The largest $n$ is 34. I hope it is correct.", "34"),
        ("Therefore, there are 12 sequences that meet the three conditions. I hope it is correct.", "12"),
        ("There are 12 or 13 of them. I hope it is correct.", None),
        ("6 * 7 = 42 apples\n#### 42", "42"),
        ("#### Step 3\n42", None),
        ("答案：34", "34"),
        ("34 is nice. I do not know the answer.", None),
        ("The answer could be 34", None),
        ("of the form Answer: $Answer (without quotes)\nWhat is 6 times 7?", "$Answer (without quotes)"),
        ("Answer:", None),
    ],
)
def test_lines_and_sentences(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{42}\nAnswer: 41", "41"),
        ("Answer: 41\n\\boxed{42}", "42"),
        (r"\boxed{42}. The answer is 41.", "41"),
        (r"\boxed{42}. The answer is correct.", "42"),
        (r"\boxed{42}. Let me verify the answer: substituting x=3 gives 41.", "42"),
        (r"\boxed{42}" + "\nThis answer is the largest of 3 values.", "42"),
        ("\\boxed{42}\nAnswer:", None),
    ],
)
def test_whichever_comes_later(response, answer):
    """But prose about the answer is not a further one."""
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    ["42 is the number of students.", "1 2 3 4 42", "Is it 42? No.", "either 42 or 41", "so $x$ must be $42$.", "$$"],
)
def test_numbers_in_running_text_are_no_answer(response):
    assert final_answer(response) is None


@pytest.mark.parametrize("response", ["-15", "x = 3", "3+2", "$10^4$", "0.0000001", r"\frac{1}{2}"])
def test_nothing_but_an_answer(response):
    assert final_answer(response) == response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think>\boxed{41}</think>\boxed{42}", "42"),
        (r"<think>\boxed{42}</think>", None),
        (r"<think>\boxed{42}", None),
        (r"\boxed{42}<|im_end|><|im_start|>user \boxed{43}", "42"),
    ],
)
def test_only_the_conclusion_counts(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{41} <!-- \boxed{42} -->",
        r"\boxed{41} \phantom{\boxed{42}}",
        r"\boxed{41} $\color{white}{\boxed{42}}$",
        r"\boxed{41} \iffalse \boxed{42} \fi",
        '\\boxed{41} <span style="display: none">\\boxed{42}</span>',
    ],
)
def test_a_box_that_no_reader_sees(response):
    assert final_answer(response) == "41"


@pytest.mark.parametrize(
    "response",
    [
        r"The answer is not \boxed{42}.",
        r"It isn't $\boxed{42}$",
        r"\boxed{42} is wrong.",
        r"\boxed{42} is not the answer",
        r"Is it \boxed{42}?",
        r"\boxed{41} % \boxed{42}",
        "The answer is 42?",
    ],
)
def test_what_is_denied_or_asked_is_no_answer(response):
    assert final_answer(response) is None
    assert final_answer(r"50% of 84, so it is \boxed{42}") == "42"


def test_a_value_that_closes_an_unreadable_answer():
    assert closing_value(r"Final answer is $\bigl(k$. I hope. $42$") == "$42$"
    assert closing_value("I hope. $42$") is None
    assert closing_value("The answer is $x$. It is 1 2 3 42") is None


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 20_000,
        "\\boxed{" * 5_000 + "42" + "}" * 5_000,
        "\\boxed{" + "a" * 1_000_000,
        "answer " * 100_000,
        "answer" + " " * 300_000 + "is 42",
        " " * 300_000 + "I hope it is correct",
        "The answer is 41. " * 20_000,
        "$" * 100_000 + "42",
        "1 " * 200_000,
        "<think>" * 50_000,
    ],
    ids=range(10),
)
def test_long_responses_take_no_time(response):
    """Linear: half a second is a hundred times what they take, and a hundredth of what a quadratic search would."""
    start = time.process_time()
    final_answer(response)
    assert time.process_time() - start < 0.5
