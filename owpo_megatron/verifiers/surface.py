r"""The text of an answer before any parser: what is invisible goes, what is spelled in many ways is spelled in one.

Nothing here judges equality except `string_form`, the fast path: equal string forms are equal answers.
"""

from __future__ import annotations

import re
import unicodedata

_SPELLINGS = {
    "−": "-", "–": "-", "‒": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt",
    "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "→": r"\to ", "⇒": r"\Rightarrow ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "ℯ": "e", "ⅇ": "e", "ⅈ": "i", "ⅉ": "j", "٬": ",", "٫": ".",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "€": r"\$", "£": r"\$", "¥": r"\$", "₹": r"\$",
    "，": ",", "。": ".", "；": ";", "：": ":", "（": "(", "）": ")", "％": "%", "＝": "=", "＋": "+", "－": "-",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u3000": " ", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
_ROOT_SIGN = re.compile(r"√\s*([0-9]+(?:\.[0-9]+)?)")  # all of its digits: no TeX
_ENTITIES = {
    "lt": "<",
    "gt": ">",
    "le": r"\le ",
    "ge": r"\ge ",
    "ne": r"\ne ",
    "times": r"\times ",
    "minus": "-",
    "nbsp": " ",
}
_ENTITY = re.compile(f"&({'|'.join(_ENTITIES)});")
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")

MAX_PEELS = 8  # delimiters around an answer that are taken off
_EMPTY_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*\}")
_INVISIBLE_COMMAND = re.compile(r"\\(?:[hv]?phantom|hspace\*?|vspace\*?|label|tag\*?)\s*(?=\{)")
_WHITE = re.compile(r"\\(?:textcolor\s*\{\s*white\s*\}|color\s*\{\s*white\s*\}\s*(?=\{))")
_WHITE_REST = re.compile(r"\\color\s*\{?\s*white\s*\}?[^{}]*")
_HIDDEN = (
    re.compile(r"<!--(?:(?!-->).)*(?:-->|$)", re.DOTALL),
    re.compile(r"<(\w+)[^<>]{0,200}display:\s*none[^<>]{0,200}>[^<]*</\1>"),
    re.compile(r"\\iffalse\b(?:(?!\\fi\b).)*(?:\\fi\b|$)", re.DOTALL),
    re.compile(r"\\begin\{comment\}(?:(?!\\end\{comment\}).)*(?:\\end\{comment\}|$)", re.DOTALL),
)
_COLOUR = re.compile(r"\\(?:textcolor|color)\s*\{[^{}]*\}")
_STYLE = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|tiny|small|large|Large|huge|bf|it|rm)(?![A-Za-z])\s*")
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)")
_EMPHASIS = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|underline|emph|mathit)\s*(?=\{)")
_OUTER = (
    ("```", "```"),
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
)
_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|textit|mbox)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9 ,])")
_SLANTED = re.compile(r"\\(?:nice|s|x|flat)frac(?![A-Za-z])")
_CHOOSE = re.compile(r"\{\s*([^{}\\]{1,20}?)\s*\\choose\s*([^{}\\]{1,20}?)\s*\}")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_POINTED_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?![0-9.,])")
_UNDERSCORED_THOUSANDS = re.compile(r"(?<![0-9.,_])[1-9][0-9]{0,2}(?:_[0-9]{3})+(?![0-9_])")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
_SPACES = re.compile(r"(?:\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s)+")
_NO_WIDTH = {"Cf", "Cc", "Cs", "Co", "Cn"}


def clean(answer: str) -> str:
    r"""The answer without delimiters, colours, styles and what cannot be seen; characters in their LaTeX spelling.

    A digit of another script is that digit; a superscript is an exponent, never a further digit.

    Example:
        >>> clean(r"$\displaystyle 5²$"), clean(r"\phantom{42}"), clean(r"\boxed{7}.")
        ('5^{2}', '', '7')
    """
    text = answer if answer.isascii() and answer.isprintable() else _ascii(answer)
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES[match[1]], text)
    if "\\" in text:
        text = (
            _CHOOSE.sub(r"\\binom{\1}{\2}", _SLANTED.sub(r"\\frac", text))
            .replace(r"\text{,}", ",")
            .replace(r"~\text", r"\ \text")
        )
        text = _drop_argument(_INVISIBLE_COMMAND, text)
        if "color" in text:
            text = _COLOUR.sub("", _WHITE_REST.sub("", _drop_argument(_WHITE, text)))
        text = _EMPHASIS.sub("", _STYLE.sub("", text))
        text = _EMPTY_TEXT.sub(r"\\ ", text).replace(r"\varnothing", r"\emptyset").replace("\\ldotp", ".")
    for _ in range(MAX_PEELS):
        previous = text
        text = _peel(text)
        if text == previous:
            break
    return _BOX.sub("", text)


def visible(text: str) -> str:
    r"""A response without what a reader would not see: comments, `\phantom`, white text, hidden elements."""
    if "<!--" in text or "none" in text or r"\iffalse" in text or "{comment}" in text:
        for hidden in _HIDDEN:
            text = hidden.sub(" ", text)
    if "phantom" in text or "white" in text:
        text = _drop_argument(_WHITE, _drop_argument(_INVISIBLE_COMMAND, text))
    return text


def _ascii(text: str) -> str:
    text = _RAISED.sub(lambda match: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, match.group())) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(map(_SUBSCRIPTS.__getitem__, match.group())) + "}", text)
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text)
    out = []
    for character in text:
        if "\U0001d400" <= character <= "\U0001d7ff":  # letters and digits of mathematical alphabets
            character = unicodedata.normalize("NFKC", character)
        if character.isascii():
            out.append(character if character.isprintable() or character in "\n\t" else "")
        elif character in _SPELLINGS:
            out.append(_SPELLINGS[character])
        elif unicodedata.category(character) == "Nd":
            out.append(str(unicodedata.digit(character)))
        elif unicodedata.category(character) not in _NO_WIDTH:
            out.append(character)
    return "".join(out)


def _peel(text: str) -> str:
    text = text.strip().rstrip(",;").removesuffix("\\").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for opening, closing in _OUTER:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            inside = text[len(opening) : len(text) - len(closing)]
            if opening not in inside and closing not in inside:
                return inside
    if text.startswith("{") and matching_brace(text, 0) == len(text) - 1:
        return text[1:-1]
    box = _BOX.match(text)
    if box and matching_brace(text, box.end()) == len(text) - 1:
        return text[box.end() + 1 : -1]
    if text.count("$") == 1:  # a lone one is a currency, or half of a pair
        text = text.replace(r"\$", "").replace("$", "")
    return text


def matching_brace(text: str, opening: int) -> int:
    """Index of the brace that closes the one at `opening`, -1 if none does."""
    depth, index = 0, opening
    while index < len(text):
        if text[index] == "\\":
            index += 1
        elif text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return -1


def _drop_argument(command: re.Pattern[str], text: str) -> str:
    out, position = [], 0
    while match := command.search(text, position):
        end = matching_brace(text, match.end()) if match.end() < len(text) and text[match.end()] == "{" else -1
        out.append(text[position : match.start()])
        position = end + 1 if end >= 0 else len(text)
    return "".join(out) + text[position:]


def string_form(cleaned: str) -> str:
    r"""A cleaned answer without what carries no meaning: spaces, text wrappers, thousands commas, \left, \dfrac.

    In the manner of DAPO's string rule, without the parts of it that call different answers equal: a space between two
    digits, words inside numbers, and everything before an equals sign stay.

    Example:
        >>> string_form(r"1{,}234"), string_form(r"\text{(A)}"), string_form(r"\dfrac12"), string_form("4 2")
        ('1234', '(A)', '\\frac{1}{2}', '4 2')
    """
    text = cleaned.replace("{,}", ",").replace(r"\!", "").replace(r"\left", "").replace(r"\right", "")
    text = text.replace(r"\$", "").replace(r"\%", "%").replace(r"^\circ", r"^{\circ}")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _FRACTION.sub(r"\\frac", _WRAPPERS.sub(r"\1", text)))
    text = _SPACES.sub(" ", text).strip()
    text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    text = _POINTED_THOUSANDS.sub(lambda match: match.group().replace(".", ""), text)
    text = _UNDERSCORED_THOUSANDS.sub(lambda match: match.group().replace("_", ""), text)
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return re.sub(r" (?![0-9])|(?<![0-9A-Za-z]) ", "", text) if " " in text else text
