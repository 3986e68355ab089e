r"""One spelling for what people write in several: plain-text mathematics, repeating decimals, upright letters, cases.

Rewrites of a cleaned answer before the parser sees it. Each keeps the value; where a spelling has two readings
(`2e-3`, `a1`), the other answer decides which one is meant.
"""

from __future__ import annotations

import re

MAX_PERIOD = 30  # digits of a repeating decimal
_UPRIGHT = re.compile(
    r"\\(?:mathrm|text|textrm|mathit|operatorname|mathop|mathbf)\s*(?:\{\s*([eijd])\s*\}|\s([eijd])(?![A-Za-z]))"
)
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|gcd|lcm|min|max|sqrt"
_UPRIGHT_NAME = re.compile(rf"\\(?:mathrm|text|textrm|operatorname)\s*\{{\s*({_NAMES})\s*\}}")
_NATURAL_LOG = re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![A-Za-z]))")
_GREEK = "alpha beta gamma delta epsilon theta lambda mu phi psi omega sigma rho tau".split()
_PLAIN_NAME = re.compile(
    rf"(?<![\\A-Za-z{{])(?:(?P<pi>pi)|(?P<inf>inf|infty|infinity|oo)|(?P<greek>{'|'.join(_GREEK)})|(?P<name>{_NAMES})"
    r"|(?:(?<=[0-9)} *])|^)(?P<log>log)(?=_?[0-9]))(?![A-Za-z])"
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
_REPEATING = re.compile(
    r"(?<![0-9.,])(?P<whole>[0-9]{0,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9})\.(?P<fixed>[0-9]{0,30})(?:"
    r"\\(?:overline|bar|overbar|widebar)\s*(?:\{\s*(?P<bar>[0-9]{1,30})\s*\}|(?P<digit>[0-9]))"
    r"|\\dot\s*\{?(?P<first>[0-9])\}?(?P<between>[0-9]{0,30})(?:\\dot\s*\{?(?P<last>[0-9])\}?)?"
    r"|(?P<paren>\([0-9]{1,30}\))"
    r"|(?P<dots>\s*(?:\\[lcd]?dots(?![A-Za-z])|\.\.\.|…)))(?![0-9])"
)
_BLOCK = re.compile(
    r"(?:\\left)?\s*(?:\\?\{|\.)?\s*\\begin\s*\{(cases|aligned|array|gathered|matrix|align\*?|split)\}(?:\{[lcr| ]*\})?"
    r"(.*?)\\end\s*\{\1\}\s*(?:\\right\s*\.?|\\?\}(?=\s*$))?",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(r"\s*[A-Za-z](?:_\{?\w{1,4}\}?)?\s*&?\s*=\s*[^=&<>]+")
_INTEGERS = re.compile(
    r"(?P<value>.*?[^\s,;])\s*(?:\\q?quad|\\[,;: ]|[,;(\s]"
    r"|\\text\s*\{[\s,(]*(?:where|for|with|and|for all|for any)?\s*\}"
    r"|\bwhere\b|\bfor\b|\bwith\b|\\forall|\\mid|\\colon)+\s*(?P<name>[a-zA-Z])\s*"
    r"(?:\\in\s*(?:\\mathbb|\\mathbf|\\Bbb)?\s*\{?\s*\\?(?P<set>[ZNQR])\s*\}?(?P<sign>(?:\^|_)\{?[+*0]\}?)?"
    r"|(?:\\text\s*\{\s*)?\s*(?:is\s+)?(?:an?\s+|any\s+)?(?P<word>integer)s?\s*\}?)\s*\)?",
    re.DOTALL,
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
    text = _UPRIGHT.sub(lambda match: match[1] or match[2], text)
    text = _UPRIGHT_NAME.sub(r"\\\1 ", text)
    text = _NATURAL_LOG.sub(r"\\ln ", text)
    text = _listed(text)
    text = repeating_as_fractions(text, other)
    text = _POWER.sub("^", text)
    if not re.search(r"(?<![\\A-Za-z])[xX](?![A-Za-z])", other):
        text = _TIMES_TEN.sub(r"\\times 10", text)
    text = _LOG_BASE.sub(r"\\log_{\1}(", text)
    text = _PLAIN_NAME.sub(_named, text)
    text = _PLAIN_POWER.sub(lambda match: "^{" + (match[1] or match[2]) + "}", text)
    text = _UNIT_FACTOR.sub("", _IMAGINARY_FACTOR.sub("", text))
    if "_" in other:
        text = _PLAIN_INDEX.sub(lambda match: _with_index(match, other), text)
    return text


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


def _listed(text: str) -> str:
    r"""`\begin{cases}x=1\\y=2\end{cases}` as `x=1,y=2`; a function defined by cases stays."""
    block = _BLOCK.fullmatch(text.strip())
    if block is None:
        return text
    rows = [row.strip().rstrip(",;.").replace("&=", "=").strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", block[2])]
    rows = [row for row in rows if row]
    return ", ".join(rows) if rows and all(map(_ASSIGNMENT.fullmatch, rows)) else text


def same_parameter(answer: str, gold: str) -> tuple[str, str]:
    r"""The values of two families with one name for their parameter: `k\pi, k\in\mathbb{Z}` is `n\pi, n\in\mathbb{Z}`.

    Unchanged where they are no families, or run over different sets.
    """
    ours, theirs = _INTEGERS.fullmatch(answer.strip()), _INTEGERS.fullmatch(gold.strip())
    if ours is None or theirs is None or _range(ours) != _range(theirs):
        return answer, gold
    name, wanted = ours["name"], theirs["name"]
    value = ours["value"]
    if name != wanted:
        letter = r"(?<![\\A-Za-z]){}(?![A-Za-z])"
        if re.search(letter.format(wanted), value):
            return answer, gold
        value = re.sub(letter.format(name), wanted, value)
    return value, theirs["value"]


def _range(match: re.Match[str]) -> tuple[str, str]:
    return match["set"] or "Z", (match["sign"] or "").strip("{}")
