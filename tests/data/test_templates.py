"""Templates, their arguments and date; no token that the model lacks; reasoning marks that stay."""

from __future__ import annotations

import datetime
import io
import json
import sys
from pathlib import Path

import pytest
from odd_models import TEMPLATES, folder, with_bos
from tokenizers import AddedToken

from owpo_megatron.config import Config, DataConfig
from owpo_megatron.data import PromptTemplate, ShuffledStream, load_prompts, load_tokenizer
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preview
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.math_answer import grade_math

DAY = datetime.date(2026, 2, 3)


def problem(text="hi", **fields):
    return Problem("p1", text, "42", "math", **fields)


def configured(**data):
    return Config.build({"model": {"path": "m"}, "data": {"source": "x.jsonl"} | data})


def chat(template, messages=(), **fields):
    backend = make_byte_tokenizer(270)
    backend.chat_template = TEMPLATES[template]
    made = PromptTemplate("chat", Tokenizer(backend), fields, DAY)
    return made.prompt(problem(messages=tuple(messages))).text


# ------------------------------------------------------------------------------------------------ arguments, files
def test_arguments_reach_the_template():
    assert chat("think").endswith("[assistant]<think>\n")
    assert chat("think", enable_thinking=False).endswith("</think>\n\n")
    with pytest.raises(
        UserError, match=r"data.template_args.enable_thinkin = False: the template has no such variable"
    ):
        chat("think", enable_thinkin=False)
    with pytest.raises(UserError, match="has no arguments; set data.template to chat"):
        configured(template_args={"enable_thinking": False})
    with pytest.raises(UserError, match="or set data.date"):
        configured(template="chat", template_args={"strftime_now": "x"})


def test_conversations_are_rendered_turn_by_turn():
    turns = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    assert chat("plain", turns) == "[system]S[user]U[assistant]A[user]V[assistant]"
    begun = [Message("user", "U"), Message("assistant", "so \\boxed{", continued=True)]
    assert chat("plain", begun) == "[user]U[assistant]so \\boxed{"
    for name in ("raw", "completion"):
        with pytest.raises(UserError, match=f"data.template = {name}: problem p1 is a conversation"):
            PromptTemplate(name, Tokenizer(make_byte_tokenizer())).prompt(problem(messages=tuple(turns)))


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("<<{{ messages[-1].content }}>>{{ extra }}")
    backend = make_byte_tokenizer(270)  # which has none
    made = PromptTemplate(str(file), Tokenizer(backend), {"extra": "E"})
    assert made.prompt(problem()).text == "<<hi>>E"
    with pytest.raises(UserError, match="nowhere.jinja: No such file or directory; name a readable .jinja file"):
        PromptTemplate(str(tmp_path / "nowhere.jinja"), Tokenizer(backend))
    with pytest.raises(UserError, match="has no chat template"):
        PromptTemplate("chat", Tokenizer(backend))
    with pytest.raises(UserError, match="data.template = mine.txt: use raw, completion, chat, or the path of a .jinja"):
        configured(template="mine.txt")


@pytest.mark.parametrize(
    ("template", "said"),
    [("raise", "Conversation must start with a system message"), ("syntax", "line 1 of the template"),
     ("undefined", "has no attribute 'nothing'")],
)  # fmt: skip
def test_a_template_that_raises_is_one_line(template, said):
    with pytest.raises(UserError, match="data.template = chat: the template cannot take problem p1") as error:
        chat(template)
    assert said in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ the date
def test_the_date_is_fixed():
    assert chat("today") == "03 Feb 2026 00:00:00 hiA:"
    tokenizer = Tokenizer(make_byte_tokenizer(270))
    data = DataConfig(source="x.jsonl", date="2025-01-02")
    assert PromptTemplate.of(data, tokenizer, DAY).date == datetime.date(2025, 1, 2)
    assert PromptTemplate.of(DataConfig(source="x.jsonl"), tokenizer, DAY).date == DAY


def test_a_stream_goes_on_with_prompts_of_the_same_date(tmp_path):
    source = Path(__file__).parent / "cases" / "d2_float.jsonl"
    backend = make_byte_tokenizer(270)
    backend.chat_template = TEMPLATES["today"]
    data = DataConfig(source=str(source), template="chat")

    def stream(day):
        return ShuffledStream(load_prompts(data, Tokenizer(backend), date=day)[0], 1)

    state = stream(DAY).state_dict()
    stream(DAY).load_state_dict(state)
    with pytest.raises(UserError, match="use the same source, limit, template and date"):
        stream(datetime.date(2026, 2, 4)).load_state_dict(state)


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{%- macro system() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ system() }}", "2026-02-03"),  # gpt-oss
        ("{{ strftime_now('%B %d, %Y') }}", "February 03, 2026"),  # Granite
        ("{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}"
         "{% set date = '26 Jul 2024' %}{% endif %}{{ date }}", "03 Feb 2026"),  # Llama 3.2
        ("{% set now = strftime_now %}{{ now('%H:%M:%S.%f') }}", "00:00:00.000000"),
        ("{% for m in messages %}{{ strftime_now('%c') }}{% endfor %}", "Tue Feb  3 00:00:00 2026"),
    ],
)  # fmt: skip
def test_so_it_is_in_the_templates_that_families_have(template, printed, tmp_path):
    (tmp_path / "t.jinja").write_text(template)
    made = PromptTemplate(str(tmp_path / "t.jinja"), Tokenizer(make_byte_tokenizer(270)), {}, DAY)
    assert made.prompt(problem()).text == printed and made.depends_on_date


@pytest.mark.parametrize("chance", ["{{ [1, 2]|random }}", "{{ range(9) | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random_is_refused(chance, tmp_path):
    """Like one that prints the time, it would make other prompts after a resume."""
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}" + chance)
    with pytest.raises(UserError, match="t.jinja: draws at random .* a resumed run would have other prompts"):
        PromptTemplate(str(tmp_path / "t.jinja"), Tokenizer(make_byte_tokenizer(270)))
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }} a random variable")
    PromptTemplate(str(tmp_path / "t.jinja"), Tokenizer(make_byte_tokenizer(270)))


# ------------------------------------------------------------------------------------------------ the vocabulary
def added(*texts):
    return tuple(AddedToken(text, special=True) for text in texts)


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    """Whether the template, the data, or the end of a response brings it."""
    template = "<|im_start|>{{ messages[0].content }}"
    files = folder(tmp_path / "m", with_bos(added=added("<|im_start|>", "<|im_end|>")), 272, template)
    tokenizer = load_tokenizer(files)
    assert (len(tokenizer), tokenizer.vocab_size) == (274, 272)
    PromptTemplate("raw", tokenizer).prompt(problem())
    with pytest.raises(UserError, match=r"token 272 \(<\|im_start\|>\), but the model has only 272"):
        PromptTemplate("chat", tokenizer).prompt(problem())
    with pytest.raises(UserError, match="token 272"):
        PromptTemplate("raw", tokenizer).prompt(problem("what is <|im_start|>?"))
    with pytest.raises(UserError, match=r"problem p1 has token 272"):
        PromptTemplate("raw", tokenizer).prompt(problem(token_ids=(4, 272)))
    (files / "generation_config.json").write_text('{"eos_token_id": [271, 273]}')
    with pytest.raises(UserError, match=r"the end of a response has token 273 \(<\|im_end\|>\)"):
        load_tokenizer(files)


def test_a_text_to_stop_at_that_the_model_lacks_is_named(tmp_path):
    files = folder(tmp_path / "m", with_bos(added=added("<|im_end|>")), 272)
    tokenizer = load_tokenizer(files)
    tokenizer.check_stop(["Question:", "</s>"])
    with pytest.raises(UserError, match=r"rollout.stop '<\|im_end\|>' has token 272 \(<\|im_end\|>\), but .* only 272"):
        tokenizer.check_stop(["Question:", "<|im_end|>"])


def test_a_language_model_inside_another(tmp_path):
    files = folder(tmp_path / "m", with_bos(), 999)
    (files / "config.json").write_text('{"text_config": {"vocab_size": 300}}')
    assert load_tokenizer(files).vocab_size == 300


# ------------------------------------------------------------------------------------------------ before a start
def looked_at(monkeypatch, capsys, files, sections=(), **data):
    """The separate process reports the line and the exit code."""
    config = Config.build({"model": {"path": str(files)}, "data": data, **dict(sections)})
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(config.model_dump(mode="json"))))
    code = preview.main()
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "vocab_size", "said"),
    [
        ("raise", 280, "Conversation must start"),
        ("syntax", 280, "of the template"),
        ("bos", 250, "the model has only 250"),
        ("bos", 280, ""),
    ],
)
def test_a_look_at_the_first_prompts(template, vocab_size, said, tmp_path, monkeypatch, capsys):
    files = folder(tmp_path / "m", with_bos(), vocab_size, TEMPLATES[template])
    source = str(Path(__file__).parent / "cases" / "d2_float.jsonl")
    code, out = looked_at(monkeypatch, capsys, files, source=source, template="chat")
    assert code == (2 if said else 0) and said in out


def test_every_prompt_is_looked_at_where_the_tokenizer_has_more_ids(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"problem": f"q{n}", "answer": n}) for n in range(preview.FIRST + 5)]
    lines.append(json.dumps({"problem": "<|im_start|>", "answer": 1}))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    files = folder(tmp_path / "m", with_bos(added=added("<|im_start|>")), 272)
    code, out = looked_at(monkeypatch, capsys, files, source=str(tmp_path / "x.jsonl"))
    assert code == 2 and "<|im_start|>" in out
    (tmp_path / "ids.jsonl").write_text('{"prompt": [3, 4], "answer": 1}\n' * 300 + '{"prompt": [272], "answer": 1}')
    assert looked_at(monkeypatch, capsys, files, source=str(tmp_path / "ids.jsonl"))[0] == 2


def test_the_end_of_a_response_that_the_model_lacks_is_looked_for(tmp_path, monkeypatch, capsys):
    """Plain texts of a tokenizer with no more ids than the model need no look; an eos token beyond them does."""
    files = folder(tmp_path / "m", with_bos(), 280)
    assert not preview._has_more_ids(files)
    (files / "generation_config.json").write_text('{"eos_token_id": [271, 300]}')
    assert preview._has_more_ids(files)
    code, out = looked_at(monkeypatch, capsys, files, source=str(Path(__file__).parent / "cases" / "d2_float.jsonl"))
    assert code == 2 and "the end of a response has token 300" in out


def test_texts_to_stop_at_and_evaluation_sets_are_looked_at_too(tmp_path, monkeypatch, capsys):
    """A template that takes every training problem may refuse one of a set."""
    refusing = "{% if 'set' in messages[0].content %}{{ raise_exception('no sets here') }}{% endif %}ok"
    files = folder(tmp_path / "m", with_bos(added=added("<|im_end|>")), 272, refusing)
    (tmp_path / "set.jsonl").write_text('{"problem": "one of a set", "answer": 1}')
    source = {"source": str(Path(__file__).parent / "cases" / "d2_float.jsonl"), "template": "chat"}
    named = {"eval": {"sets": [{"name": "mine", "source": str(tmp_path / "set.jsonl")}]}}
    assert looked_at(monkeypatch, capsys, files, **source)[0] == 0
    code, out = looked_at(monkeypatch, capsys, files, named, **source)
    assert code == 2 and "no sets here" in out
    code, out = looked_at(monkeypatch, capsys, files, {"rollout": {"stop": ["<|im_end|>"]}}, **source)
    assert code == 2 and "rollout.stop '<|im_end|>' has token 272" in out


@pytest.mark.slow
@pytest.mark.process
def test_preflight_says_it_in_one_line(tmp_path):
    from owpo_megatron.launch.preflight import CHECKS

    files = folder(tmp_path / "m", with_bos(), 280, TEMPLATES["raise"])
    source = str(Path(__file__).parent / "cases" / "d2_float.jsonl")
    config = Config.build({"model": {"path": str(files)}, "data": {"source": source, "template": "chat"}})
    (check,) = [one for one in CHECKS if one.__name__ == "_prompts"]
    with pytest.raises(UserError, match="data.template = chat: .*Conversation must start with a system message"):
        check(config)


# ------------------------------------------------------------------------------------------------ reasoning
@pytest.mark.parametrize("special", [True, False])
def test_marks_of_reasoning_stay_in_a_decoded_response(special):
    """Dropping `[/THINK]`, special for some tokenizers, would turn the reasoning into a conclusion."""
    marks = tuple(AddedToken(text, special=special) for text in ("[THINK]", "[/THINK]", "<tool>"))
    backend = with_bos(added=marks)
    tokenizer = Tokenizer(backend)
    ids = backend.encode(r"[THINK]\boxed{41}[/THINK]\boxed{42}</s>", add_special_tokens=False)
    assert tokenizer.decode(ids) == r"[THINK]\boxed{41}[/THINK]\boxed{42}"
    assert ("<tool>" in tokenizer.decode(backend.encode("a<tool>"))) is not special


def test_a_truncated_response_behind_an_open_think_has_no_answer():
    """The path from the template to the verdict, as in a run and in an evaluation."""
    prompt = chat("think")
    scratch = r"hmm, perhaps \boxed{42}. Wait, let me check that again: 6 times 7"
    assert grade_math(GradingItem(scratch, "42", "math", prompt=prompt)) == "no_answer"
    assert grade_math(GradingItem(scratch + r"</think>\boxed{42}", "42", "math", prompt=prompt)) == "ok"
    closed = chat("think", enable_thinking=False)
    assert grade_math(GradingItem(r"It is \boxed{42}.", "42", "math", prompt=closed)) == "ok"
