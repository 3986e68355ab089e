"""The rule for mathematics on hand-made cases of every class. The public suites are in test_public_suites.py."""

from __future__ import annotations

import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import DirectVerifier, VerifierPool, make_verifier
from owpo_megatron.verifiers.golds import gold_text
from owpo_megatron.verifiers.math_answer import MathRule
from owpo_megatron.verifiers.surface import clean, string_form

RULE = MathRule()


def boxed(answer, gold):
    """The verdict of the full rule, and that its quick part never contradicts it."""
    item = GradingItem(f"\\boxed{{{answer}}}", gold)
    verdict, quick = RULE(item), RULE.quick(item)
    assert quick in (None, verdict)
    return verdict == "ok"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "42"), ("042", "42"), ("42.0", "42"), ("+42", "42"), (r"\frac{84}{2}", "42"), ("42", "042"),
        (r"42\text{ apples}", "42"), (r"42 \text{ cm}^2", "42"), (r"\$42", "42"), (r"42^\circ", "42"),
        ("42 dollars", "42"),
        ("4{,}200", "4200"), ("1,234,567", "1234567"), ("1 234 567", "1234567"), (r"12\,345", "12345"),
        (r"12,\!345", "12345"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), ("0.333333", "1/3"), (r"\frac12", "0.5"),
        (r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), ("x^2+2x+1", "(x+1)^2"),
        ("p - q", "p-q"),
        ("x = 42", "42"), ("x = 6*7 = 42", "42"), (r"6\cdot 7 = 42", "42"), ("2x+1", "y=2x+1"),
        ("y - 2x = 1", "y=2x+1"),
        ("(1, 2)", "(1,2)"), (r"\{2,1\}", r"\{1,2\}"), (r"x \in (1,2)", "(1,2)"), (r"(-\infty,3)", "x<3"),
        ("1, 2", r"\{1,2\}"),
        (r"p=5,q=2;p=7,q=2", r"p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2"),
        (r"\text{Evelyn}", "Evelyn"), ("yes", r"\text{Yes}"), ("(A)", "A"), (r"\text{A}", "(A)"),
        (r"\textbf{(B)}\ 42", "42"), (r"\textbf{(B)}\ 42", "B"), (r"\text{(B) } 42", "42"),
        (r"204_{5}", "204_5"), ("204", "204_5"), (r"204_{\text{five}}", "204_5"), ("42_{10}", "42"),
        ("4 4/9", "40/9"), ("-4 4/9", "-40/9"), (r"4\frac{4}{9}", "40/9"), (r"4\ \frac{4}{9}", r"\frac{40}{9}"),
        ("5²", "25"), ("４２", "42"), ("4\u200b2", "42"), ("2π", r"2\pi"), ("½", "0.5"), (r"\varnothing", r"\emptyset"),
        ("42 million", "42000000"), (r"1.5 \text{ million}", "1500000"), ("2^{100}", "4^{50}"), ("2023!", "2023!"),
        (r"\textcolor{red}{42}", "42"), (r"\mathbf{42}", "42"), (r"\boxed{42}", "42"), (r"x=\boxed{42}", "42"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\frac{1}{0}", r"\frac{1}{0}"),
        ("42", r"thus \boxed{42}."), ("1,2", r"\boxed{1} and \boxed{2}"), ("10^{-7}", "0.0000001"),
        (r"\log_2 8", "3"), (r"\sin^2 x", r"1-\cos^2 x"), (r"x=3 \text{ or } x=-3", "3,-3"),
        (r"x \geq 1", r"[1,\infty)"),
    ],
)  # fmt: skip
def test_equal(answer, gold):
    assert boxed(answer, gold)


CONTRADICTIONS = [
    "41 = 42",
    "x = 41 = 42",
    "42 = 41",
    r"41 \to 42",
    r"41 \Rightarrow 42",
    "41 → 42",
    "41 -> 42",
    "43 = 6*7",
]
INVISIBLE = [
    r"\phantom{42}", r"\hphantom{42}", r"41\phantom{42}", r"\vphantom{42}41", r"\textcolor{white}{42}",
    r"\color{white}42",
    r"\hspace{42}", r"\ ", r"41\boxed{42}",
]  # fmt: skip
SPRAYS = [
    "41, 42", "42, 41", "42; 41", "42 41", r"42\quad 41", r"42 \\ 41", r"4 \, 2", r"4\ 2", r"4\text{ }2", "42 or 41",
    r"42 \text{ or } 41", r"\{0,1,...,100\}", "[0,100]", r"0 \le n \le 999", r"x \in \{41,42\}", "(41,42)",
    "x = 41, y = 42",
    "41 < 42", r"42 \pm 1", r"42 \text{ (or 41)}", r"42 (41)", r"\begin{cases}41\\42\end{cases}", r"42\ldots",
    "42...", r"\le 42",
]  # fmt: skip
WORDS = [
    "not 42", r"\text{not }42", "maybe 42", "41 because 42 is wrong", r"42\text{ (not 41)}", "42?",
    r"\text{same as reference}",
    "There is no answer; 42", r"\text{something with }42", r"42\text{ million}",
]  # fmt: skip
OTHERS = [
    "42_{5}", "42_5", "42!", "-42", "42i", "42.4", r"\approx 42.4", "42^{42}", "42/41", r"4\cdot 2", "x", "?", "1/0",
    r"\overline{4}2", "0=0", r"\mathbb{R}", "𝟒𝟑", "41", r"\int_0^{42} 1 dx", r"\input{42}",
]  # fmt: skip


@pytest.mark.parametrize("answer", [*CONTRADICTIONS, *INVISIBLE, *SPRAYS, *WORDS, *OTHERS])
def test_not_42(answer):
    assert not boxed(answer, "42")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("4 4/9", "4"), ("4 4/0", "4"), ("11 7/6", "7/6"), ("11 6/6", "12"), ("4 4/9", "8/9"),
        (r"4\frac{4}{9}", r"\frac{16}{9}"),
        ("5²", "52"), ("0.0000002", "0.0000001"), ("0.0000001", "0"), ("0.33", "1/3"), ("32, 349", "32349"),
        ("204_6", "204_5"),
        ("[2,5]", "[2,5)"), ("q - p", "p-q"), ("(2,1)", "(1,2)"), (r"\text{No}", r"\text{Yes}"), ("42", ""),
        ("1-1/e", "1+1/e"),
        ("f(y)", "f(x)"), ("6.28", r"2\pi"), ("x < 5", "x > 5"), ("(1,2,3)", "(1,2)"), (r"x^{100}-1=0", "x=1"),
    ],
)  # fmt: skip
def test_not_equal(answer, gold):
    assert not boxed(answer, gold)


@pytest.mark.parametrize(
    ("response", "gold", "reason"),
    [
        ("Answer: 34", "34", "ok"),
        ("34 students", "34", "no_answer"),
        (r"\boxed{35}", "34", "wrong"),
        (r"\boxed{" + "x" * 3000 + "}", "9", "too_long"),
        (r"\boxed{(10^7)!}", "9", "parse_failed"),
        (r"\boxed{\phantom{9}}", "9", "no_answer"),
    ],
)
def test_reasons(response, gold, reason):
    assert RULE(GradingItem(response, gold)) == reason


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("42", "42", True),
        ("Thus $x <= 2$ is our answer.", r"$x \leq 2$", True),
        ("so the number is 10 which is 1,000.99", "1000.99", True),
        ("$x = 5+5+1 = 7 =11$", "$x = 11$", True),
        ("41 = 42", "42", False),
        ("The answer is 4 4/9.", "4", False),
    ],
)
def test_an_extracted_answer_may_be_a_sentence(prediction, gold, right):
    """form "answer": the caller declares it the answer, so math-verify's own extraction may find it in prose."""
    assert (RULE(GradingItem(prediction, gold, form="answer")) == "ok") is right
    if prediction.startswith("so the"):
        assert RULE(GradingItem(prediction, gold)) == "no_answer"


def test_names_of_symbols_matter_or_not():
    item = GradingItem(r"\boxed{f(y)}", "f(x)")
    assert RULE(item) == "wrong" and MathRule(strict=False)(item) == "ok"


def test_forms():
    assert [string_form(clean(text)) for text in ("$34$.", "1,234", r"1{,}234", r"\text{ABC}", "1,2", "**5**",
    "1,23")] == [
        "34", "1234", "1234", "ABC", "1,2", "5", "1,23",
    ]  # fmt: skip
    assert string_form("4 2") == "4 2" and string_form("0,111") == "0,111"
    assert gold_text(r"\boxed{1} no no no \boxed{2}") == "2"


def test_trivial_domains_need_no_processes():
    assert isinstance(make_verifier(VerifierConfig(), {"cipher", "countdown"}), DirectVerifier)
    assert isinstance(make_verifier(VerifierConfig(rule="cipher"), {"math"}), DirectVerifier)


@pytest.mark.process
def test_each_domain_gets_its_rule():
    """`math` and a domain that a file made up go to the rule for mathematics, a task's to its own."""
    verifier = make_verifier(VerifierConfig(workers=1), {"cipher", "math", "algebra"})
    assert isinstance(verifier, VerifierPool)
    items = [
        GradingItem("x0k", "x0k", "cipher"),
        GradingItem("it is x0k", "x0k", "math"),
        GradingItem("Answer: 2x", "x+x", "algebra"),
    ]
    verdicts = verifier.score(items)
    verifier.close()
    assert [v.reason for v in verdicts] == ["ok", "no_answer", "ok"]
    assert [v.correct for v in verdicts] == [True, False, True]
