r"""Whether two answers are equal as mathematics: math-verify, with its measured weaknesses closed around it.

Before the library: refuse what is too large, contradictory chains (`41 = 42`), arrows, numbers merely next to
each other, numerals of another base; read mixed numbers. After it: floats that are equal only because both are tiny.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from owpo_megatron.types import VerdictReason
from owpo_megatron.verifiers.golds import gold_text
from owpo_megatron.verifiers.integer_families import same_family, same_parameter, same_residue
from owpo_megatron.verifiers.limits import refuse_expression, refuse_text
from owpo_megatron.verifiers.named_values import misplaced
from owpo_megatron.verifiers.piecewise import same_branches, undecided
from owpo_megatron.verifiers.real_sets import same_set
from owpo_megatron.verifiers.spelling import respelled
from owpo_megatron.verifiers.surface import clean

# It warns once per process that its own timeouts are off; the pool's deadline is on.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)

_NORMAL = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_LATEX = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all", equations=False
))]  # fmt: skip
_PLAIN = [ExprExtractionConfig()]
_NUMBERLIKE = re.compile(r"[-+]?[0-9.,][0-9.,]*(?: [0-9]{3})*[0-9.,]*\s*(?:\\?%)?")
_ARITHMETIC = re.compile(r"[-+0-9.,/*^() ]*[0-9)][-+0-9.,/*^() %]*")
_DANGLING = re.compile(r"(?:[-+*/^=<>]|\\times|\\cdot|\\div)\s*$")  # what follows is missing
_ARROW = re.compile(r"\\(?:to|mapsto|gets|implies|iff|(?:long|Long)?(?:left)?(?:right|Right)arrow)(?![A-Za-z])|[-=]>")
_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=)")
_LISTED = re.compile(r"[,;&]|\\\\|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_ROWS = re.compile(r"[^\s\\]\s*\\\\\s*[^\s\\]")
_SET = re.compile(r"\[|\]|\\infty|\\cup")
_APPROX = re.compile(r"\\approx(?:eq)?(?![A-Za-z])|\\simeq(?![A-Za-z])")
_BASE = re.compile(r"([0-9A-F]+)\)?\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*([0-9]+|[a-z]+)\s*\}?\s*\}|([0-9]))")
_OTHER_BASE = "^{base}"  # makes of a numeral an expression that equals no number
_BASE_NAMES = {
    name: str(value) for value, name in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=2)
} | {"sixteen": "16", "hex": "16"}  # fmt: skip
_MIXED = re.compile(
    r"([-+]?)\s*([0-9]+)(?:[ \t]|\\[ ,]|~)+(?:([0-9]+)\s*/\s*([0-9]+)|\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})"
    r"\s*(\\?%|percent(?:age)?|pct)?"
)
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?: |\\,|\\ |~|,\s?\\!|\{,\}|,)[0-9]{3})+(?![0-9])")
_ADJACENT = re.compile(r"(?<![_^0-9.])[0-9]+(?:\.[0-9]+)?(?:\s|\\[,;: ]|~|\\q?quad)+(?:\\frac|[0-9])")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_SPAN = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+", re.DOTALL)
_DOTS = re.compile(r"\\[lcvd]?dots[a-z]?(?![A-Za-z])|\.\.\.|\.\.(?=\s*[^\s.])|…")
_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox)\s*\{([^{}]*)\}")
_DOUBT = re.compile(
    r"(?<![A-Za-z\\])(?:not|no|isn|never|maybe|perhaps|possibly|either|neither|unknown|wrong|incorrect|guess|except|unless"
    r"|instead|rather)(?![A-Za-z])|[?#]",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?:\\text[a-z]*\s*\{\s*)?\(([A-J])\)(?:\s*\}|(?=\s|\\ ))[\s.:]*(?:\\ |\\quad|~)*\s*(?![()])(.+)")
_UNIT_WORDS = re.compile(
    r"((?:[-+0-9.,/(){}^\s]|\\d?frac|\\sqrt|\\pi|\\cdot|\\times)*[0-9)}])\s+((?:[A-Za-z]{2,}\s*){1,4})"
)
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(.*[0-9)}}])(?:\s|\\ |~)*(?:\\text[a-z]*\s*\{{)?\s*({'|'.join(_POWERS_OF_TEN)})\s*\}}?\s*(.*)", re.DOTALL
)
_NO_UNITS = frozenset(
    "or and to plus minus times over mod percent percentage pct pi dozen squared cubed factorial less more than"
    " per".split()
)


class Refused(Exception):
    """The answer is not to be compared; the verdict is `reason`."""

    def __init__(self, reason: VerdictReason):
        super().__init__(reason)
        self.reason = reason


@lru_cache(maxsize=4096)  # siblings often give the same answer
def equivalent(answer: str, gold: str, derived: bool = False, strict: bool = True) -> VerdictReason:
    """`ok`, `wrong`, or why the answer was not compared.

    Args:
        answer, gold: cleaned texts (`surface.clean`).
        derived: extracted by the caller; a derivation `x = 5 + 6 = 11` is read as its end without checking its links.
        strict: names of variables matter.
    """

    def same(one: str, other: str) -> bool:
        return equivalent(one, other, strict=strict) == "ok"

    if misplaced(answer, gold, same):
        return "wrong"
    verdict = _verdict(answer, gold, derived, strict)
    if verdict in ("ok", "too_long") or refuse_text(answer, gold):
        return verdict
    spelled, spelled_gold = respelled(answer, gold), respelled(gold, answer)
    plain, plain_gold = same_parameter(spelled, spelled_gold)
    if (plain, plain_gold) != (answer, gold):
        again = _verdict(plain, plain_gold, derived, strict)
        verdict = again if again != "parse_failed" else verdict
    if verdict == "ok" or same_set(plain, plain_gold, _number, strict) or same_residue(plain, plain_gold):
        return "ok"
    if same_family(spelled, spelled_gold, _number):
        return "ok"
    return "ok" if same_branches(plain, plain_gold, same) else verdict


def _verdict(answer: str, gold: str, derived: bool, strict: bool) -> VerdictReason:
    try:
        return "ok" if _equal(answer, gold, derived, strict) else "wrong"
    except Refused as refusal:
        return refusal.reason
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return "parse_failed"  # sympy may raise anything on expressions that make no sense; the answer is at fault


def _equal(answer: str, gold: str, derived: bool, strict: bool) -> bool:
    reason = refuse_text(answer, gold)
    if reason:
        raise Refused(reason)
    for sign in (_ARROW, _DOTS, _DOUBT):
        if sign.search(answer) and not sign.search(gold):
            return False
    if any(re.search("[0-9]", text) for text in _TEXT.findall(answer)) and not _TEXT.search(gold):
        return False
    if _ROWS.search(answer) and r"\begin" not in answer and not _ROWS.search(gold):
        return False  # several lines are no single value: math-verify takes the last one
    if _DANGLING.search(answer) and not _DANGLING.search(gold):
        raise Refused("parse_failed")
    if undecided(answer) and not undecided(gold):
        return False
    answer = _without_choice(answer, gold)
    answer, gold = _unit_words(_scaled(answer)), _unit_words(_scaled(gold))
    answer, gold = _mixed(answer), _mixed(gold)
    if _ADJACENT.search(_SPACED_THOUSANDS.sub("0", answer)) and not _ADJACENT.search(gold) and "&" not in answer:
        return False
    answer, gold = _same_base(answer, gold)
    answer = _end_of_chain(answer, gold, derived)
    approximation = _APPROX.split(answer)
    if len(approximation) > 1 and not _APPROX.search(gold):
        answer = next((part for part in approximation if part.strip()), answer)
    return _compare(answer, gold, strict)


def _without_choice(answer: str, gold: str) -> str:
    r"""`\textbf{(B)}\ 42`: the letter where the gold answer is one, else what follows it."""
    match = _CHOICE.fullmatch(answer)
    if not match:
        return answer
    letter = re.fullmatch(r"(?:\\text[a-z]*\s*\{)?\s*\(?([A-J])\)?\s*\}?", gold)
    return match[1] if letter else match[2]


def _scaled(text: str) -> str:
    r"""`1.5 \text{ million}` is a number, not 1.5 of some unit."""
    match = _SCALED.fullmatch(text)
    return f"({match[1]}) \\cdot 10^{{{_POWERS_OF_TEN[match[2]]}}} {match[3]}".strip() if match else text


def _unit_words(text: str) -> str:
    """Drop up to four words behind a number; words that count are kept."""
    match = _UNIT_WORDS.fullmatch(text)
    if not match or any(word.lower() in _NO_UNITS for word in match[2].split()):
        return text
    return match[1]


def _mixed(text: str) -> str:
    r"""`4 4/9` is 40/9, as math-verify reads `4\frac{4}{9}`. Raises Refused if the fraction is not proper."""
    match = _MIXED.fullmatch(text.strip())
    if not match:
        return text
    sign, whole = match[1], int(match[2])
    over, under = int(match[3] or match[5]), int(match[4] or match[6])
    if over >= under:
        raise Refused("parse_failed")
    percent = 100 if match[7] else 1
    return f"{'-' if sign == '-' else ''}\\frac{{{whole * under + over}}}{{{under * percent}}}"


def _same_base(answer: str, gold: str) -> tuple[str, str]:
    """Drop the base of a numeral where both mean the same one. A base that the gold answer leaves out is not 10."""
    ours, theirs = _BASE.fullmatch(answer.strip(" ()")), _BASE.fullmatch(gold.strip(" ()"))
    if ours is None:
        return (answer, theirs[1]) if theirs else (answer, gold)
    base = _base(ours)
    if theirs is None:
        return (ours[1], gold) if base == "10" else (ours[1] + _OTHER_BASE, gold)
    return (ours[1], theirs[1]) if base == _base(theirs) else (ours[1] + _OTHER_BASE, theirs[1])


def _base(match: re.Match[str]) -> str:
    return _BASE_NAMES.get(match[2] or "", match[2] or match[3])


def _end_of_chain(answer: str, gold: str, derived: bool) -> str:
    """The last member of a chain of equalities whose numbers agree. Raises Refused where they contradict each other."""
    if "=" not in answer or _LISTED.search(answer):
        return answer
    parts = [part.strip() for part in _EQUALS.split(answer)]
    if len(parts) < 2:
        return answer
    numbers = [value for value in map(_number, parts) if value is not None]
    headed = _number(parts[0]) is None
    if not (derived and headed) and any(not _close(numbers[0], value) for value in numbers[1:]):
        raise Refused("wrong")
    if len(parts) > 2 and _EQUALS.search(gold) is None:
        return parts[-1]
    return parts[-1] if not headed and _EQUALS.search(gold) is None else answer


def _number(text: str) -> Any:
    """The value of a text as a sympy number, None if it is none or is too large."""
    if not text or refuse_text(text, ""):
        return None
    for expression in _readings(text):
        if getattr(expression, "is_number", False) and not refuse_expression(expression, None):
            value = expression.evalf(20)
            return value if value.is_Float or value.is_Integer else None
    return None


def _close(one: Any, other: Any) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1e-12)


def _compare(answer: str, gold: str, strict: bool) -> bool:
    golds = _readings(gold)
    ours = _readings(answer)
    expressions = [expression for expression in ours if not isinstance(expression, str)]
    reference = next((expression for expression in golds if not isinstance(expression, str)), None)
    if any(refuse_expression(expression, reference) for expression in expressions):
        raise Refused("parse_failed")
    if not ours:
        raise Refused("parse_failed")
    as_sets = _SET.search(gold) is not None  # `(1,2)` alone may be a point, so `1 < x < 2` does not equal it
    if not verify(list(golds), list(ours), strict=strict, allow_set_relation_comp=as_sets, timeout_seconds=None):
        if not expressions and reference is not None:
            raise Refused("parse_failed")
        return False
    return not _both_tiny(expressions, reference, answer, gold)


def _both_tiny(expressions: list[Any], reference: Any, answer: str, gold: str) -> bool:
    """Whether the answer is a float that equals the gold one only because both round to 0 at six decimals."""
    if "%" in answer or "%" in gold or reference is None or not getattr(reference, "is_number", False):
        return False
    for expression in expressions:
        if not getattr(expression, "is_number", False):
            return False
        one, other = expression.evalf(20), reference.evalf(20)
        if not (one.is_number and other.is_number and one.is_real and other.is_real):
            return False
        if abs(one - other) <= 1e-3 * max(abs(one), abs(other)):
            return False
    return bool(expressions)


@lru_cache(maxsize=512)
def _readings(text: str) -> tuple[Any, ...]:
    """math-verify's readings of one cleaned answer: expressions, and the text for a comparison of strings."""
    found: list[Any] = []
    if _NUMBERLIKE.fullmatch(text.strip()):
        found += parse(text.strip(), _PLAIN, parsing_timeout=None, fallback_mode="no_fallback")  # type: ignore[arg-type]
    found += parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None)  # type: ignore[arg-type]
    if all(isinstance(value, str) for value in found) and _ARITHMETIC.fullmatch(text):
        found += parse(text, _PLAIN, parsing_timeout=None, fallback_mode="no_fallback")  # type: ignore[arg-type]
    return tuple(found)


def found_in_text(answer: str, gold: str) -> bool:
    r"""Whether math-verify's own extraction finds the gold answer in a text with prose around the answer.

    For answers that a caller has extracted: sentences such as `Thus $x <= 2$ is our answer.` count as answers. Not for
    what a policy wrote, because that extraction takes any trailing number.
    """
    if not _PROSE.search(_SPAN.sub(" ", answer)) or _MIXED.search(answer) or refuse_text(answer, gold):
        return False
    kinds = _LATEX if "$" in gold else [*_LATEX, *_PLAIN]
    ours = parse(answer, kinds, parsing_timeout=None)  # type: ignore[arg-type]
    golds = list(_readings(clean(gold_text(gold))))
    if r"\boxed" not in gold:
        golds += parse(gold, parsing_timeout=None)  # type: ignore[arg-type]
    reference = next((value for value in golds if not isinstance(value, str)), None)
    if any(refuse_expression(value, reference) for value in ours if not isinstance(value, str)):
        return False
    return bool(verify(golds, ours, timeout_seconds=None))
