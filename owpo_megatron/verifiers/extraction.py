r"""Find the final answer in a response: last box, `<answer>`, `Answer:` line or "the answer is", whichever comes last.

A response with none of these forms has no answer: a number somewhere near the end is not one, or every text that
happens to mention numbers would sometimes be right. All searches are linear in the response.
"""

from __future__ import annotations

import re

from owpo_megatron.verifiers.announcing import (
    AFTER_MARKER,
    CLAUSE,
    CLOSING_COPULA,
    DOUBTED,
    LINKING,
    MARKER,
    TAKEN_BACK,
)
from owpo_megatron.verifiers.boxes import BOXES, MAX_MARKERS, is_taken_back, is_withdrawn, joined_boxes
from owpo_megatron.verifiers.opening import Opening, conclusion, opening_of
from owpo_megatron.verifiers.surface import visible

MAX_SEGMENT = 600  # characters after an answer marker that are looked at
WINDOW = 20_000  # characters from the end in which markers are looked for
MAX_BARE = 120  # characters of a response that is nothing but an answer
_FRAME = re.compile(r"<\s*(/?)\s*(?:(?:final[_ ]?)?answer|ans|solution)(?:\s+[a-z]+=[^<>]{0,40})?\s*>", re.IGNORECASE)
_OTHER_FRAME = re.compile(r"\[(/?)(?:final[_ ]?)?answer\]|<\|(/?)answer\|>|&lt;(/?)answer&gt;", re.IGNORECASE)
_SOLUTION_MARK = re.compile(r"<\|(?:begin|(end))_of_solution\|>")
_TAG_AT_END = re.compile(r"(?:\s*</?[A-Za-z_]{1,20}>)+\s*$")

_HEADING = re.compile(r"[ \t*_#:]*\n")
_LINE_START = re.compile(r"(?:^|\n)[\s>#*_\-]*(?:(?:the|my|so|thus|final|correct)\s+){0,3}$", re.IGNORECASE)
_MINERVA_END = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。](?=\s+(?:[A-Z]|\[|<|$)|\s*$|[*\"”']+\s*$)|。")
_HASHES = re.compile(r"####[ \t]*([^\n#]+)$")  # GSM8K's form, as the last line
_SENTENCE_BREAK = re.compile(r"[.!?]\s+")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_INNER_TEXT = re.compile(r"\\(?:text|mathrm|operatorname|mbox|textbf|begin|end)\s*\{[^{}]*\}")
_COPULA = re.compile(r"\b(?:is|are|equals|equal to|be)\b\s*:?\s*", re.IGNORECASE)
_VALUE = re.compile(r"\$[^$\n]+\$|\\\(.+?\\\)|-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
_NUMERIC_WORDS = frozenset("pi sin cos tan cot sec csc ln log exp sqrt and or inf infinity oo mod cm mm km kg".split())


def final_answer(response: str, prompt: str = "") -> str | None:
    r"""The answer's text, stripped, or None if the response has no final answer.

    Only what follows the reasoning (`</think>`) counts; unfinished reasoning has no answer, whether the response or the
    prompt opened it. What else the end of the prompt opened (`\boxed{`, `<answer>`, `Answer:`) belongs to the response.
    An empty or unclosed last box is no answer, whatever an earlier box contains.

    Example:
        >>> final_answer(r"First \boxed{17}. No: \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> final_answer("so\nAnswer: $34$")
        '$34$'
        >>> final_answer("it could be 34") is None
        True
        >>> final_answer("34}.", prompt=r"The result is \boxed{")
        '34'
    """
    opening = opening_of(prompt)
    text = _concluded(response, opening)
    if opening.is_frame and not opening.reasoning:
        return _answer_in(opening.text + text)
    found = _answer_in(text)
    if found is None and opening.text and text.strip() and not opening.reasoning:
        found = _marked(opening.text + text, -1) or None
    return found


def bare_response(response: str) -> str | None:
    """The response if it is nothing but one mathematical expression, else None."""
    return _bare(_concluded(response, Opening()))


def closing_value(response: str, prompt: str = "") -> str | None:
    """The last sentence behind the last answer marker if it is nothing but a value, else None.

    For answers that cannot be read: `The answer is $garbled$. I hope. $42$` still claims 42.
    """
    text = _concluded(response, opening_of(prompt))
    markers = [match for match in MARKER.finditer(text, max(0, len(text) - MAX_SEGMENT))]
    if not markers:
        return None
    sentences = _SENTENCE_BREAK.split(text[markers[-1].end() :].strip())
    return _bare(sentences[-1]) if len(sentences) > 1 else None


def _concluded(response: str, opening: Opening) -> str:
    """Return what a reader sees of the response after its reasoning."""
    text = visible(conclusion(response, opening)).rstrip()
    if "_of_solution|>" in text:
        text = _SOLUTION_MARK.sub(lambda mark: "</solution>" if mark[1] else "<solution>", text)
    return _OTHER_FRAME.sub(lambda mark: f"<{mark[1] or mark[2] or mark[3] or ''}answer>", text)


def _answer_in(text: str) -> str | None:
    framed = _framed(text)
    if framed is not None:
        return framed or None
    box = max(text.rfind(name) for name in BOXES)
    marked = _marked(text, box)
    if marked is not None:
        return marked or None
    if box >= 0:
        return joined_boxes(text)
    hashes = _HASHES.search(text, max(0, len(text) - MAX_BARE))
    if hashes:
        return _bare(hashes[1])
    return _before_closing_formula(text) or _bare(text)


def _framed(text: str) -> str | None:
    """Return the answer in the last `<answer>...</answer>`; "" if empty, None without a frame or with text after it."""
    tags = list(_FRAME.finditer(text, max(0, len(text) - WINDOW)))
    if not tags:
        return None
    while len(tags) > 1 and tags[-1][1] and tags[-2][1] and not text[tags[-2].end() : tags[-1].start()].strip():
        tags.pop()  # closed twice
    last = tags[-1]
    behind = text[last.end() :]
    if any(name in behind for name in BOXES) or _marked(behind, -1) is not None:
        return None
    if not last[1]:
        return ""  # opened and never closed
    if len(tags) < 2 or tags[-2][1]:
        return None  # a closing tag alone frames nothing
    inside = text[tags[-2].end() : last.start()].strip()
    if not inside or is_taken_back(text, tags[-2].start(), last.end()) or is_withdrawn(text, last.end()):
        return ""
    claimed = _answer_in(inside)
    if claimed is None and not any(name in inside for name in BOXES):
        claimed = _value_of(inside, prose=True) or inside
    return claimed or ""


def _marked(text: str, box: int) -> str | None:
    """The answer after the last answer marker behind the last box; "" if that answer is empty, None without one."""
    markers = list(MARKER.finditer(text, max(0, box, len(text) - WINDOW)))
    for match in reversed(markers[-MAX_MARKERS:]):
        starts_line = bool(_LINE_START.search(text, max(0, match.start() - 80), match.start()))
        after = AFTER_MARKER.match(text, match.end()) or (starts_line and _HEADING.match(text, match.end()))
        if not after:
            continue
        if DOUBTED.search(text, max(0, match.start() - 80), match.start()):
            return ""
        announced = after.re is _HEADING or bool(after["colon"])
        strong = announced and starts_line
        segment = _segment(text, after.end(), next_line=announced)
        if strong and not segment:
            return ""
        if segment:
            end = text.index(segment, after.end()) + len(segment)
            if is_withdrawn(text, end) or TAKEN_BACK.match(text, end):
                return ""
        answer = _value_of(segment, prose=not strong or box < 0)
        if answer and (box < 0 or strong or not _words(answer)):
            return answer
        if strong:
            return segment
    return None


def _segment(text: str, start: int, next_line: bool) -> str:
    """The rest of the sentence or line, or the next line that is not empty."""
    window = text[start : start + MAX_SEGMENT]
    stripped = window.lstrip()
    if window[: len(window) - len(stripped)].count("\n") and not next_line:
        return ""
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        if stripped.startswith(opening):
            inside, closed, _ = stripped[2:].partition(closing)
            return inside.strip() if closed else ""
    line = _TAG_AT_END.sub("", stripped.partition("\n")[0])
    question = _SENTENCE_END.search(line)
    if question and question.group() == "?":
        return ""
    for stop in (_SENTENCE_END, _MINERVA_END, CLAUSE):
        end = stop.search(line)
        if end:
            line = line[: end.start()]
    line = line.strip().strip("*_").strip()
    return line[:-1].rstrip() if line.endswith("]") and "[" not in line else line


def _words(text: str) -> list[str]:
    """Words of prose: letters outside commands, longer than a symbol, no functions or units."""
    plain = _INNER_TEXT.sub(" ", text)
    return [word for word in _WORD.findall(plain) if word.lower() not in _NUMERIC_WORDS]


def _value_of(segment: str, prose: bool) -> str:
    """The answer in a sentence's rest: all of it, the part after its last `is`, or its only value."""
    linking = LINKING.match(segment)
    if linking and linking.end() < len(segment):
        segment = segment[linking.end() :].strip()
    segment = CLOSING_COPULA.sub("", segment)
    if not segment:
        return ""
    copulas = list(_COPULA.finditer(segment))
    if copulas and prose:
        tail = segment[copulas[-1].end() :].strip()
        return tail if tail and len(_words(tail)) <= 4 else _only_value(segment)
    if len(_words(segment)) <= 4:
        return segment
    return _only_value(segment) if prose else segment


def _only_value(sentence: str) -> str:
    values = {match.group() for match in _VALUE.finditer(sentence)}
    return values.pop() if len(values) == 1 else ""


def _before_closing_formula(text: str) -> str | None:
    """The only value of the sentence that Minerva's "I hope it is correct." closes."""
    formulas = list(_MINERVA_END.finditer(text, max(0, len(text) - WINDOW)))
    if not formulas:
        return None
    before = text[max(0, formulas[-1].start() - MAX_SEGMENT) : formulas[-1].start()].rstrip(" .")
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    return _only_value(before[ends[-1] :] if ends else before) or None


def _bare(text: str) -> str | None:
    text = text.strip()
    if not text or len(text) > MAX_BARE or "\n" in text or _words(text) or re.search(r"[?!]\s|\?$", text):
        return None
    if text[0] == "[" and text[-1] == "]" and text.count("$") == 2:
        text = text[1:-1].strip()
    if not re.search(r"[0-9]|\\[a-z]|[a-zA-Z]\s*$", text) or re.search(r"[0-9]\s+[0-9]+\s+[0-9]", text):
        return None
    return text
