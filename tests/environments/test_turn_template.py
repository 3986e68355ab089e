"""The tokens between a reply and the next one: equal to the template's own, and never of what the engine wrote."""

from __future__ import annotations

from typing import Any

import pytest

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.environments import TurnTemplate
from owpo_megatron.errors import UserError

OPEN = "{% for m in messages %}"
CLOSE = "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHATML = OPEN + "<|start|>{{ m.role }}\n{{ m.content }}<eos>\n" + CLOSE
TRIMS = OPEN + "<|start|>{{ m.role }}\n{{ m.content | trim }}<eos>\n" + CLOSE
FORGETS = (
    OPEN
    + "<|start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    + "{% else %}{{ m.content }}{% endif %}<eos>\n"
    + CLOSE
)
COUNTS = OPEN + "<|start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<eos>\n" + CLOSE
ECHOES = CHATML.replace("assistant\n{% endif", "assistant (asked: {{ messages[0].content }})\n{% endif")
DROPS = OPEN + "{% if m.role != 'assistant' %}<|start|>{{ m.content }}<eos>\n{% endif %}" + CLOSE
NO_TOOLS = CHATML.replace("{{ m.role }}", "{{ raise_exception('no tool') if m.role == 'tool' else m.role }}")


def template_of(text: str, said: list[str] | None = None, **limits: Any) -> tuple[TurnTemplate, Tokenizer]:
    plain = make_byte_tokenizer()
    plain.chat_template = text
    tokenizer = Tokenizer(plain)
    say = [].append if said is None else said.append
    config = EnvironmentConfig(name="lookup", **limits)
    return TurnTemplate(PromptTemplate("chat", tokenizer), config, 500, say), tokenizer


@pytest.mark.parametrize("text", [CHATML, TRIMS, FORGETS], ids=["chatml", "trims", "forgets"])
@pytest.mark.parametrize("reply", ["forty two", "é and \n two lines"])
def test_put_together_it_is_the_templates_rendering_of_the_whole_conversation(text: str, reply: str) -> None:
    turns, tokenizer = template_of(text)
    eos = tokenizer.eos_ids[0]
    opening = PromptTemplate("chat", tokenizer).prompt(Problem("p", "6 * 7?", "42", "default"))
    ids = [*opening.token_ids, *tokenizer.encode(reply), eos]
    ids += turns.between([Message("user", "are you sure?")], ids[-1])
    whole = [Message("user", "6 * 7?"), Message("assistant", reply), Message("user", "are you sure?")]
    assert tokenizer.decode_all(ids) == tokenizer.chat(whole, text)
    assert tuple(ids) == tokenizer.encode(tokenizer.chat(whole, text))


def test_a_reply_that_did_not_end_its_turn_gets_the_templates_end() -> None:
    turns, tokenizer = template_of(CHATML)
    (last,) = tokenizer.encode("]")  # a stop text ended it
    text = tokenizer.decode_all(turns.between([Message("tool", "42")], last))
    assert text == "<eos>\n<|start|>tool\n42<eos>\n<|start|>assistant\n"


def test_a_template_that_rewrites_earlier_turns_says_so_once() -> None:
    said: list[str] = []
    turns, tokenizer = template_of(FORGETS, said)
    for _ in range(3):
        turns.between([Message("user", "go on")], tokenizer.eos_ids[0])
    assert said == ["the chat template rewrites earlier turns; episodes keep them as they were generated"]
    assert not template_of(CHATML, plain := [])[0] or plain == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (COUNTS, "depends on what came before"),
        (ECHOES, "depends on what came before"),
        (DROPS, "leaves out a reply that an observation follows"),
        (NO_TOOLS, "no tool"),
    ],
    ids=["counts", "echoes", "drops", "no tool role"],
)  # fmt: skip
def test_what_cannot_be_put_together_is_refused_before_anything_starts(text: str, told: str) -> None:
    with pytest.raises(UserError, match=f"data.template = chat: .*{told}"):
        template_of(text, role="tool")


def test_a_long_observation_loses_its_middle() -> None:
    turns, tokenizer = template_of(CHATML, max_observation_tokens=200)
    ids = turns.between([Message("user", "a" * 2000 + "b" * 2000)], tokenizer.eos_ids[0])
    text = tokenizer.decode_all(ids)
    assert 120 < len(ids) <= 200 and "aaa\n... (" in text and text.endswith("bbb<eos>\n<|start|>assistant\n")


def test_an_opening_of_the_environment_takes_the_prompts_place() -> None:
    turns, tokenizer = template_of(CHATML)
    prompt = PromptTemplate("chat", tokenizer).prompt(Problem("p", "a question", "42", "maths"))
    assert turns.opening([Message("user", "a question")], prompt) is prompt
    opened = turns.opening([Message("system", "use the tool"), Message("user", "a question")], prompt)
    assert opened.text.startswith("<|start|>system\nuse the tool<eos>\n<|start|>user\na question<eos>")
    assert (opened.id, opened.answer, opened.domain) == ("p", "42", "maths")
    with pytest.raises(UserError, match="data.max_prompt_tokens = 500: the environment's opening of problem p has"):
        turns.opening([Message("user", "x" * 600)], prompt)
