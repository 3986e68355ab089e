r"""One spelling for what people write in several: plain-text mathematics, repeating decimals, upright letters, cases.

Rewrites of a cleaned answer before the parser sees it. Each keeps the value; where a spelling has two readings
(`2e-3`, `a1`), the other answer decides which one is meant.
"""

from __future__ import annotations

import re
from fractions import Fraction

from owpo_megatron.verifiers.piecewise import as_list

MAX_PERIOD = 30  # digits of a repeating decimal
_UPRIGHT = re.compile(
    r"\\(?:mathrm|text|textrm|mathit|operatorname|mathop|mathbf|mathsf|textsf|textit)\s*(?:\{\s*([eijd])\s*\}|\s([eijd])(?![A-Za-z]))"
)
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|gcd|lcm|min|max|sqrt"
_UPRIGHT_NAME = re.compile(rf"\\(?:mathrm|text|textrm|operatorname)\s*\{{\s*({_NAMES})\s*\}}")
_SHORT_INVERSE = re.compile(r"(?<![A-Za-z\\])a(sin|cos|tan)(?=\s*\()")
_BRACED_NAME = re.compile(rf"(?<![A-Za-z}}])\{{\s*({_NAMES})\s*\}}")
_NATURAL_LOG = re.compile(r"(?<![A-Za-z])\\?log\s*_\s*(?:\{\s*e\s*\}|e(?![A-Za-z]))")
_GREEK = "alpha beta gamma delta epsilon theta lambda mu phi psi omega sigma rho tau".split()
_UPRIGHT_GREEK = re.compile(rf"\\up(pi|{'|'.join(_GREEK)})(?![a-z])")
_PLAIN_NAME = re.compile(
    rf"(?<![\\A-Za-z{{])(?:(?P<pi>[Pp][Ii])|(?P<inf>[Ii]nf|infty|[Ii]nfinity|oo)|(?P<greek>{'|'.join(_GREEK)})|(?P<name>{_NAMES})"
    r"|(?:(?<=[0-9)} *])|^)(?P<log>log)(?=_?[0-9]))(?![A-Za-z])"
)
_SHORT_INVERSE = re.compile(r"(?<![A-Za-z\\])a(sin|cos|tan)(?=\s*\()")
_FRACTION_OF_PI = re.compile(r"(?<![0-9./^{_])([0-9]{1,9})\s*/\s*([0-9]{1,9})\s+\\pi(?![A-Za-z])")
_CALLS = {"abs": ("|", "|"), "floor": (r"\lfloor ", r"\rfloor "), "ceil": (r"\lceil ", r"\rceil "),
    "ceiling": (r"\lceil ", r"\rceil "), "cbrt": (r"\sqrt[3]{", "}"), r"\sqrt": (r"\sqrt{", "}")}  # fmt: skip
_CALL = re.compile(r"((?<![A-Za-z\\])(?:abs|floor|ceil|ceiling|cbrt)|\\sqrt)\s*\(")
_MODULE = re.compile(r"(?<![A-Za-z\\.])(?:[cC]?[mM]ath|np|numpy|sympy|sp)\.(?=[a-z])")
_TWO_ARGUMENTS = re.compile(
    r"(?<![A-Za-z\\])(?:log\(([^(),]{1,40}),\s*([^(),]{1,20})\)|pow\(([^(),]{1,40}),\s*([^(),]{1,20})\))"
)
_LOG_IN_WORDS = re.compile(
    r"(?<![A-Za-z\\])log(?:arithm)?\s+(?:to\s+)?(?:the\s+)?base\s+([0-9]{1,3})\s+of\s+([0-9a-z]{1,9})(?![A-Za-z])"
)
_LONG_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*([0-9]{2,30})(?![0-9.])")
_DECIMAL_POWER = re.compile(r"\^\s*(?:\(\s*|\{\s*)?(-?)([0-9]{0,3})\.([0-9]{1,4})(?![0-9.])(?:\s*[)}])?")
_FRACTION_POWER = re.compile(r"\^\s*(\\frac\{[0-9]{1,9}\}\{[0-9]{1,9}\})")
_MINUS_WORD = re.compile(r"^(?:minus|negative)\s+(?=[0-9.]|\\frac|\\sqrt)", re.IGNORECASE)
_OTHER_UNIT = re.compile(r"(?<![A-Za-z\\])[jI](?![A-Za-z])")
_UNION_LETTER = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_BACKSLASH = re.compile(r"\\backslash\s*(?=\\\{|\(|\[)|(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)")
_NOT_IN = re.compile(r"[a-z]\s*\\not(?:in(?![a-z])|\s*\\in(?![a-z]))\s*(?=[(\[{\\])")
_ANGLES = re.compile(r"(?:\\left)?\s*\\langle(?![a-z])([^<>]*,[^<>]*?)(?:\\right)?\s*\\rangle")
_ALL_REALS = re.compile(r"(?:\\text\s*\{)?\s*(?:the set of\s+)?all\s+reals?(?:\s+numbers?)?\s*\}?", re.IGNORECASE)
_UNIT_QUOTIENT = re.compile(
    r"(?<=[0-9}])(?:\s|\\[,; ])*\\[dt]?frac\s*"
    r"(?:\{\s*\\(?:text|mathrm)\s*\{[A-Za-z ]{1,12}\}(?:\^\{?[0-9]\}?)?\s*\}\s*){2}$"
)
_LOG_BASE = re.compile(r"(?<![\\A-Za-z])\\?log_?\{?([0-9]{1,3})\}?\s*\(")
_POWER = re.compile(r"\*\*")
_PLAIN_POWER = re.compile(r"\^\s*(?:\(([^(){}]{1,40})\)|(-?[0-9]{1,9}(?![0-9.])|-[a-z]))")
_TIMES_TEN = re.compile(r"(?<=[0-9])\s*[xX*]\s*10\s*(?=\^)")
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z0-9_.\\^{])([0-9]{1,20}(?:\.[0-9]{1,20})?)[eE]([-+]?[0-9]{1,3})(?![A-Za-z0-9_.^])"
)
_UNIT_FACTOR = re.compile(r"(?<![0-9.A-Za-z^_{])1(?:\.0{1,6})?\s*\*?\s*(?=[ij](?![A-Za-z]))")
_IMAGINARY_FACTOR = re.compile(r"(?<=[0-9)])\s*\*\s*(?=[ij](?![A-Za-z]))")
_PLAIN_INDEX = re.compile(r"(?<![A-Za-z\\_])([A-Za-z])([0-9]{1,3})(?![A-Za-z0-9.])")
_COMBINING = re.compile(r"(?:[0-9][\u0305\u0304\u0307])+")
_DOT_ABOVE = re.compile(r"\\overset\s*\{\s*(?:\.|\\cdot|\\bullet)\s*\}\s*\{\s*([0-9])\s*\}")
_BRACED_PERIOD = re.compile(r"(?<=[.0-9])\{\s*(\\(?:overline|bar|dot)\s*\{[0-9]{1,30}\})\s*\}")
_TIGHT_PERCENT = re.compile(r"(?<=[0-9])(\\frac\{[0-9]{1,9}\}\{[0-9]{1,9}\}\s*\\?%)$")
_DOTS = r"\s*(?:\\[lcd]?dots(?![A-Za-z])|\.\.\.|…)"
_DECIMAL_COMMA = re.compile(r"(?<![0-9.,])([0-9]{1,9})\{,\}(?=[0-9]{1,2}(?![0-9,{])|[0-9]{0,9}\\(?:overline|bar|dot))")
_REPEATING_COMMA = re.compile(r"(-?[0-9]{1,9}),([0-9]{0,9}\\(?:overline|bar|dot)\s*\{?[0-9]{1,30}\}?)")
_REPEATING = re.compile(
    r"(?<![0-9.,])(?P<whole>[0-9]{0,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9})\.(?P<fixed>[0-9]{0,30})(?:"
    r"\\(?:overline|bar|overbar|widebar)\s*(?:\{\s*(?P<bar>[0-9]{1,30})\s*\}|(?P<digit>[0-9]))"
    r"|\\dot\s*\{?(?P<first>[0-9])\}?(?P<between>[0-9]{0,30})(?:\\dot\s*\{?(?P<last>[0-9])\}?)?"
    r"|(?P<paren>\([0-9]{1,30}\))"
    r"|(?P<dots>" + _DOTS + r"))(?:" + _DOTS + r")?(?![0-9])"
)


def respelled(text: str, other: str) -> str:
    r"""A cleaned answer in the spelling that the parser reads.

    Args:
        other: what it is compared with; decides where a spelling has two readings.

    Example:
        >>> respelled("5x10^3", "5000"), respelled(r"0.1\overline{6}", ""), respelled(r"\mathrm{e}^{2}", "")
        ('5\\times 10^{3}', '\\frac{15}{90}', 'e^{2}')
    """
    if not re.search(r"(?<![\\A-Za-z])e(?![A-Za-z])", other):
        text = _SCIENTIFIC.sub(lambda match: rf"{match[1]}\times 10^{{{int(match[2])}}}", text)
    text = _MINUS_WORD.sub("-", _MODULE.sub("", text))
    text = _TIGHT_PERCENT.sub(r" \1", _BRACED_PERIOD.sub(r"\1", _DOT_ABOVE.sub(r"\\dot{\1}", text)))
    if _only_unit(text, other):
        text = _OTHER_UNIT.sub("i", text)
    text = _UPRIGHT.sub(lambda match: match[1] or match[2], text)
    text = _BRACED_NAME.sub(r"\\\1 ", _UPRIGHT_NAME.sub(r"\\\1 ", text))
    text = _NATURAL_LOG.sub(r"\\ln ", _UPRIGHT_GREEK.sub(r"\\\1", text))
    text = as_list(text)
    text = _DECIMAL_COMMA.sub(r"\1.", text)
    text = repeating_as_fractions(
        _REPEATING_COMMA.sub(r"\1.\2", text) if _REPEATING_COMMA.fullmatch(text) else text, other
    )
    text = _POWER.sub("^", text)
    text = _SHORT_INVERSE.sub(r"\\arc\1", _with_delimiters(text))
    if not re.search(r"(?<![\\A-Za-z])[xX](?![A-Za-z])", other):
        text = _TIMES_TEN.sub(r"\\times 10", text)
    text = _LONG_ROOT.sub(r"\\sqrt{\1}", _LOG_IN_WORDS.sub(r"\\log_{\1}(\2)", _TWO_ARGUMENTS.sub(_two_arguments, text)))
    text = _FRACTION_POWER.sub(r"^{\1}", _DECIMAL_POWER.sub(_power, text))
    text = _LOG_BASE.sub(r"\\log_{\1}(", text)
    text = _called(_PLAIN_NAME.sub(_named, text))
    text = _FRACTION_OF_PI.sub(r"\\frac{\1}{\2}\\pi", text)
    text = _PLAIN_POWER.sub(lambda match: "^{" + (match[1] or match[2]) + "}", text)
    text = _UNIT_FACTOR.sub("", _IMAGINARY_FACTOR.sub("", text))
    if "_" in other:
        text = _PLAIN_INDEX.sub(lambda match: _with_index(match, other), text)
    return text


def _with_delimiters(text: str) -> str:
    """Plain-text unions, differences, vectors and the words for all real numbers in their LaTeX spelling."""
    if _ALL_REALS.fullmatch(text):
        return r"\mathbb{R}"
    text = _NOT_IN.sub(r"\\mathbb{R}\\setminus ", text)
    text = _ANGLES.sub(r"(\1)", _BACKSLASH.sub(r"\\setminus ", _UNION_LETTER.sub(r"\\cup ", text)))
    return _UNIT_QUOTIENT.sub("", text)


def _only_unit(text: str, other: str) -> bool:
    """Whether `14-1j` can only mean an imaginary unit: the other answer has one, and there is no other letter."""
    letters = set(re.findall(r"[A-Za-z]", text))
    return letters in ({"j"}, {"I"}) and re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", other) is not None


def _two_arguments(match: re.Match[str]) -> str:
    """Python's `log(3, 2)` is a logarithm to base 2, `pow(x, 2)` a square."""
    return rf"\log_{{{match[2]}}}({match[1]})" if match[1] else f"({match[3]})^{{{match[4]}}}"


def _power(match: re.Match[str]) -> str:
    """A decimal exponent as the fraction that it is: `2^{0.5}` is a root."""
    value = Fraction(int((match[2] or "0") + match[3]), 10 ** len(match[3]))
    return rf"^{{{match[1]}\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _called(text: str) -> str:
    """`abs(x)` as `|x|`, `√(x+1)` as a root of all of it; a call that is not closed stays."""
    start = 0
    while match := _CALL.search(text, start):
        end = _closing(text, match.end() - 1)
        if end < 0:
            return text
        before, after = _CALLS[match[1]]
        text = text[: match.start()] + before + text[match.end() : end] + after + text[end + 1 :]
        start = match.start() + len(before)
    return text


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return -1


def _named(match: re.Match[str]) -> str:
    if match["pi"]:
        return r"\pi "
    if match["inf"]:
        return r"\infty "
    return "\\" + (match["greek"] or match["name"] or match["log"]) + (" " if match["greek"] else "")


def _with_index(match: re.Match[str], other: str) -> str:
    """`a1` is `a_1` where the other answer has an `a` with that index."""
    found = re.search(rf"(?<![A-Za-z\\]){match[1]}_(?:\{{{match[2]}\}}|{match[2]}(?![0-9]))", other)
    return f"{match[1]}_{{{match[2]}}}" if found else match[0]


def repeating_as_fractions(text: str, other: str = "") -> str:
    r"""`0.\overline{3}`, `0.\dot{3}`, `0.(3)` and `0.333\ldots` as the fractions that they are.

    Dots repeat the digits before them only where they show the period twice, or are all there is: `0.3\ldots` and
    `0.1666\ldots`, not `3.14\ldots` or `0.123\ldots`.
    """
    text = _COMBINING.sub(lambda match: rf"\overline{{{re.sub('[^0-9]', '', match[0])}}}", text)
    return _REPEATING.sub(lambda match: _fraction(match, other), text)


def _fraction(match: re.Match[str], other: str) -> str:
    whole, fixed = (match["whole"] or "0").replace(",", ""), match["fixed"]
    if match["first"]:
        period = match["first"] + (match["between"] + match["last"] if match["last"] else "")
        if not match["last"] and match["between"]:
            return match[0]
    elif match["paren"]:
        period = match["paren"][1:-1]
        if fixed and not re.search(r"\\frac|/", other):  # else a product: 0.5(3)
            return match[0]
    elif match["dots"]:
        found = re.fullmatch(r"([0-9]*?)([0-9]{1,12}?)\2+", fixed) or re.fullmatch(r"()([0-9])", fixed)
        if not found:
            return match[0]
        fixed, period = found[1], found[2]
    else:
        period = match["bar"] or match["digit"]
    if len(period) > MAX_PERIOD:
        return match[0]
    over = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{over}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"
