r"""Detect what the end of a prompt has opened for the response: reasoning, a box, an answer's frame or line.

DeepSeek-R1's and Qwen3-Thinking's templates end with `<think>`, others are prefilled with `\boxed{` or `Answer:`. The
response goes on from there and never repeats it, so a grader that sees the response alone takes unfinished reasoning
for a conclusion, and a closed box for no box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_OPENING = 300  # characters of a prompt's last line that can belong to the answer
_NAMES = (  # also <mm:think>, <longcat_think>, <thinking_process>
    r"(?:[a-z0-9]{1,12}[:_])?(?:think|thinking|thoughts?|reasoning|reason|reflection|analysis|scratchpad|monologue|cot)"
    r"(?:_(?:process|on))?"
)
_BARRED = "think|thinking|thought|reasoning"
_REASONING = re.compile(
    rf"(?P<open><{_NAMES}\s?>|<[|｜](?:{_BARRED})(?:_start)?[|｜]>|<\|channel>thought"
    r"|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>|◁think▷|<start_working_out>"
    r"|<\|channel\|>(?:analysis|commentary)[^<]{0,60}<\|message\|>)"
    rf"|(?P<close></{_NAMES}\s?>|<[|｜](?:/(?:{_BARRED})|(?:{_BARRED})_end)[|｜]>|<channel\|>"
    r"|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>|◁/think▷|<end_working_out>"
    r"|<\|channel\|>final[^<]{0,60}<\|message\|>)",
    re.IGNORECASE,
)
REASONING_MARKS = ("[THINK]", "[/THINK]", "<|begin_of_thought|>", "<|end_of_thought|>", "<|START_THINKING|>",
    "<|END_THINKING|>", "◁think▷", "◁/think▷", "<think>", "</think>", "<thinking>", "</thinking>", "<thought>",
    "</thought>", "<reasoning>", "</reasoning>", "<mm:think>", "</mm:think>", "<longcat_think>",
    "</longcat_think>", "<|think_start|>",
    "<|think_end|>", "<|channel>", "<channel|>", "<seed:think>", "</seed:think>", "<start_working_out>",
    "<end_working_out>", "<|channel|>", "<|message|>")  # fmt: skip
"""Texts of tokens that a decoded response must keep, even where a tokenizer calls them special."""
# Where an assistant's turn begins, so that a <think> behind it is the response's own and not one that a user mentions.
_ASSISTANT = re.compile(
    r"(?:assistant|model|bot|solution|answer|response|\[/INST\]|(?:^|\n)a)[^\w<]{0,4}(?:<\|[a-z_]+\|>|[^\w<]){0,4}$"
    r"|<[|｜](?:assistant|end_header_id|im_sep)[|｜]>\s*$",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end|return|user|eom_id)\|>|<(?:start|end)_of_turn>|<｜User｜>"
    r"|<｜end▁of▁sentence｜>"
)
_CHANNEL = re.compile(r"<\|channel\|>[^<]{0,80}<\|message\|>")
_BOX = re.compile(r"\\f?boxed\s*\{")
_FRAME = re.compile(r"<\s*(?:final[_ ]?)?answer\s*>\s*$", re.IGNORECASE)
_LINE = re.compile(
    r"(?:answers?|antwort|réponse|respuesta|risposta|resposta|ответ|答案|答え|정답)(?:\s+(?:to|of)\s[^.:\n]{0,80})?[\s*_]*"
    r"(?:[:：]|is|are|=|ist|est|es|是|为|は)[\s*_:]*[$(\\\[]{0,3}$",
    re.IGNORECASE,
)
# A few-shot or question-answer frame: a base model goes on with the next question, whose answer is not ours.
_LABEL = re.compile(
    r"(?:^|\n)[ \t*#]*(Question|Problem|Exercise|Q|Input|Human|User|问题|質問|문제)[ \t*]*[0-9]{0,3}[.:：]",
    re.IGNORECASE,
)
_ASKED = re.compile(
    r"(?:^|\n|\.\s|\?\s)[ \t*#]*(?:A|Answer|Solution|Response|Assistant|Output|Explanation|答案?|解答?|답)[ \t*]*"
    r"[0-9]{0,3}[:：][^\n]{0,200}$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Opening:
    """The part of the response that is already in the prompt.

    Example:
        Opening(reasoning=False, text="\\\\boxed{", is_frame=True, label="")
    """

    reasoning: bool = False  # inside <think> when the response begins
    text: str = ""  # the beginning of the answer's own form
    is_frame: bool = False  # `text` is a box or a tag that the response has to close; else the beginning of a line
    label: str = ""  # of the question in a question-answer frame


@lru_cache(maxsize=4096)  # siblings share their prompt
def opening_of(prompt: str) -> Opening:
    r"""Return what the end of this prompt opened; nothing for "".

    Example:
        >>> opening_of("<|Assistant|><think>\n").reasoning, opening_of(r"so it is \boxed{").text
        (True, '\\boxed{')
    """
    if not prompt:
        return Opening()
    if _is_reasoning(prompt):
        return Opening(reasoning=True, label=_label(prompt))
    tail = prompt[-MAX_OPENING:]
    line = tail.rpartition("\n")[2]
    boxes = list(_BOX.finditer(tail))
    if boxes and not _TURN.search(tail, boxes[-1].end()) and _unclosed(tail[boxes[-1].end() - 1 :]):
        return Opening(text=tail[boxes[-1].start() :], is_frame=True, label=_label(prompt))
    frame = _FRAME.search(tail)
    if frame:
        return Opening(text=frame.group(), is_frame=True, label=_label(prompt))
    begun = _LINE.search(line)
    return Opening(text=line if begun else "", label=_label(prompt))


def conclusion(response: str, opening: Opening = Opening()) -> str:
    """Return the text after the reasoning, up to the end of the turn; "" if the reasoning is unfinished."""
    channels = list(_CHANNEL.finditer(response))  # each of its messages ends a turn; the last one counts
    turn = _TURN.search(response, channels[-1].end() if channels else 0)
    if turn:
        response = response[: turn.start()]
    if opening.label:
        again = _LABEL.search(response)
        if again and again[1].lower() == opening.label and response[: again.start()].strip():
            response = response[: again.start()]
    closed = 0
    for mark in _REASONING.finditer(response):
        if mark["close"]:
            closed = mark.end()
    if opening.reasoning and not closed:
        return ""
    text = response[closed:]
    unfinished = _REASONING.search(text)
    return text if unfinished is None else text[: unfinished.start()]


def _is_reasoning(prompt: str) -> bool:
    """Whether the last opening mark is the response's own and nothing closed it."""
    marks = list(_REASONING.finditer(prompt))
    if not marks or marks[-1]["close"]:
        return False
    last = marks[-1]
    if not prompt[last.end() :].strip():
        return True
    if _TURN.search(prompt, last.end()):
        return False
    return _ASSISTANT.search(prompt[max(0, last.start() - 60) : last.start()]) is not None


def _unclosed(text: str) -> bool:
    """Whether the brace that a text begins with is open at its end, with no further paragraph in between."""
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return False
    return "\n\n" not in text


def _label(prompt: str) -> str:
    """The question's label in `Question: ... Answer:`, where the prompt ends with the label of the answer."""
    if not _ASKED.search(prompt[-MAX_OPENING:]):
        return ""
    labels = list(_LABEL.finditer(prompt, max(0, len(prompt) - 4000)))
    return labels[-1][1].lower() if labels and not _TURN.search(prompt, labels[-1].end()) else ""
