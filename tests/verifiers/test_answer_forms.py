"""Forms of answers: every spelling of tests/data/cases, right ones and hostile ones, and what a prompt has opened."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.cases import read_cases, read_golds
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.golds import gold_text, unreadable
from owpo_megatron.verifiers.math_answer import grade_math
from owpo_megatron.verifiers.opening import opening_of
from owpo_megatron.verifiers.rules import RULE_NAMES, find_rule

CASES = Path(__file__).parents[1] / "data" / "cases"
THINK = "<|User|>q<|Assistant|><think>\n"


def misjudged(name: str) -> list[tuple[str, str]]:
    found = []
    for case in read_cases(CASES / name, "math"):
        reason = grade_math(case.item)
        if case.expected is not None and (reason == "ok") != case.expected:
            found.append((case.id, reason))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["answers.jsonl", "golds_forms.jsonl", "forms.jsonl"])
def test_every_spelling_has_its_verdict(name):
    assert misjudged(name) == []


@pytest.mark.slow
def test_no_hostile_answer_passes():
    lines = (CASES / "hostile_forms.jsonl").read_text().splitlines()
    assert len(lines) >= 200 and all(json.loads(line)["expected"] is False for line in lines)
    assert misjudged("hostile_forms.jsonl") == []


# ------------------------------------------------------------------------------------------------ what a prompt opened
@pytest.mark.parametrize(
    ("prompt", "reasoning"),
    [
        (THINK, True),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        ("[user]q[assistant]<think>\nOkay, so", True),
        ("User: q\nAssistant: <think>", True),
        ("<s>[INST]q[/INST][THINK]", True),
        ("q<thinking>\n", True),
        ("q<|begin_of_thought|>", True),
        ("<|im_start|>assistant\n<|thinking|>", True),
        ("<|im_start|>assistant\n<｜think｜>", True),
        ("<|turn>model\n<|channel>thought\n", True),
        ("<mm:think>", True),
        ("<|im_start|>assistant\n<thinking_process>\n", True),
        ("q<|think_start|>a<|think_end|>", False),
        ("<|im_start|>system\nReason in <scratchpad>.<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think> reasoning </think> <answer> answer </answer>. User: q. Assistant: <think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is the <think> tag?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Begin with <think>, then answer. What is 6*7?", False),
        ("<think> reasoning </think> <answer> answer </answer>. User: q. Assistant:", False),
        ("", False),
    ],
)
def test_whether_reasoning_is_open(prompt, reasoning):
    assert opening_of(prompt).reasoning is reasoning
    boxed = GradingItem(r"so \boxed{42}", "42", "math", prompt=prompt)
    assert grade_math(boxed) == ("no_answer" if reasoning else "ok")


ANSWERS = {"math": "42", "math_any_symbols": "42", "gsm8k": "42", "multiple_choice": "B"}
"""Rules that look for an answer behind the reasoning, and one that they know."""
NOT_ASKED = {
    "dapo": "the published rule, which looks at the last 300 characters whatever they are",
    "dapo_strict_box": "the same for boxes",
    "cipher": "a generated task without reasoning: the whole response is the answer",
    "countdown": "a generated task without reasoning: the whole response is the answer",
    "lookup": "a generated task without reasoning: the last turn is the answer",
    "sums": "a generated task with a mark of its own",
    "code": "asked with programs, in test_code_rule.py",
}


def test_every_rule_is_asked_about_unfinished_reasoning_or_has_its_reason():
    assert ANSWERS.keys() | NOT_ASKED.keys() == set(RULE_NAMES) and not ANSWERS.keys() & NOT_ASKED.keys()


@pytest.mark.parametrize("rule", ANSWERS)
@pytest.mark.parametrize("prompt", [THINK, "q<start_working_out>", "<|start|>assistant<|channel|>analysis<|message|>"])
def test_no_rule_takes_unfinished_reasoning_for_an_answer(rule, prompt):
    answer = ANSWERS[rule]
    forms = (rf"\boxed{{{answer}}}", f"#### {answer}", f"Answer: {answer}", answer, f"<answer>{answer}</answer>",
        f"The correct option is {answer}.", f"<solution>{answer}</solution>")  # fmt: skip
    judge = find_rule(rule)
    for form in forms:
        assert judge(GradingItem(form, answer, rule, prompt=prompt)) == "no_answer", form
        assert judge(GradingItem(f"<think>{form}", answer, rule)) == "no_answer", form
        assert judge(GradingItem(f"{form}</think>", answer, rule, prompt=prompt)) == "no_answer", form
    for done in (rf"a</think>\boxed{{{answer}}}", f"a</think>Answer: {answer}"):
        assert judge(GradingItem(done, answer, rule, prompt=prompt)) == "ok"


@pytest.mark.parametrize(
    ("prompt", "response", "answer"),
    [
        (r"The final answer is $\boxed{", "42}$. Done.", "42"),
        (r"so \boxed{\frac{", "84}{2}}", r"\frac{84}{2}"),
        (r"so \boxed{", "42", None),
        (r"so \boxed{", r"41} no, \boxed{42}", "42"),
        (r"Put it in \boxed{}. What is 6*7?", "it might be 42 or so", None),
        ("Assistant: <answer>", " 42 </answer>", "42"),
        ("Assistant: <answer>", "42", None),
        ("Q: 6*7?\nA: The answer is", " 42. It was easy to see, was it not.", "42"),
        ("Question: 6*7?\nAnswer:", " 42\n\nQuestion: 1+1?\nAnswer: 2", "42"),
        ("Question: 6*7?\nSolution:", "I do not know.\n\nQuestion: 1+1?\nSolution: \\boxed{2}", None),
        ("What is 6*7?", "Question: is it 42?\nSo \\boxed{42}", "42"),
    ],
)
def test_what_the_prompt_began_belongs_to_the_answer(prompt, response, answer):
    assert final_answer(response, prompt) == answer


def test_the_grader_gets_the_prompt():
    from owpo_megatron.types import Prompt, Rollout

    rollout = Rollout(Prompt("1", (1,), THINK, "42", "math"), (5,), (0.0,), 0, "length", 1)
    item = GradingItem.of(rollout, lambda ids: r"\boxed{42}")
    assert item.prompt == THINK and grade_math(item) == "no_answer"


# ------------------------------------------------------------------------------------------------ gold answers
@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("It is 1+1=<<1+1=2>>2.\n#### 2", "2"),
        ("Therefore, the answer is: 180.", "180"),
        (r"So the answer is $\boxed{2}$.", "2"),
        ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),
        ("x = 2", "x = 2"),
        (r"\text{the answer}", r"\text{the answer}"),
        ("#### x\nmore", "#### x\nmore"),
    ],
)
def test_what_of_a_gold_answer_is_the_answer(gold, text):
    assert gold_text(gold) == text


@pytest.mark.parametrize(
    ("gold", "rule", "why"),
    [
        ("42", "math", None),
        (r"\text{Monday}", "math", None),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "math", None),
        ("1+1=2.\n#### 2", "math", None),
        ("First add them up and then take away the rest of it", "math", "prose"),
        ("1\n2", "math", "several lines"),
        (r"\phantom{42}", "math", "empty"),
        (r"\frac{1}{2", "math", "unbalanced braces"),
        ("two", "gsm8k", "no number"),
        ("NaN", "math", "a missing value"),
        ("n/a", "multiple_choice", "a missing value"),
        ("so it is\n#### 1,234", "gsm8k", None),
        ("A or B", "multiple_choice", "no letter"),
        ("a\nb", "dapo", "several lines"),
        ("1,2", "countdown", "not NUMBERS=TARGET"),
        ("anything", "cipher", None),
    ],
)
def test_gold_answers_that_no_response_can_equal(gold, rule, why):
    assert unreadable(gold, rule) == why


def test_a_data_set_of_solutions_verifies_against_itself(tmp_path):
    (tmp_path / "g.jsonl").write_text(
        '{"answer": "1+1=2.\\n#### 2"}\n{"answer": 0.5}\n{"answer": "the answer is: 7."}\n'
    )
    for rule in ("math", "gsm8k"):
        cases = read_golds(tmp_path / "g.jsonl", rule)[: 2 if rule == "gsm8k" else 3]
        assert [find_rule(rule)(case.item) for case in cases] == ["ok"] * len(cases)


@pytest.mark.parametrize(
    "unit",
    [
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "<answer>42",
        "[THINK]",
        "Question:\n",
        "answer: ",
        "\\boxed{",
        "wait ",
    ],
)
def test_no_response_is_too_deep_for_the_callers_process(unit):
    """`quick` runs in the trainer's process: repeated thousands of times, no form recurses or takes long."""
    for response in (unit * 20_000, r"\boxed{42}. " + unit * 20_000, unit * 20_000 + "42"):
        started = time.process_time()
        grade_math.quick(GradingItem(response, "42", "math", prompt="Question: x\nAnswer:"))
        assert time.process_time() - started < 2
