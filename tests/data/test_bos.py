"""BOS exactly once, for every template and every kind of tokenizer."""

from __future__ import annotations

import pytest
from odd_models import TEMPLATES, with_bos
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from owpo_megatron.config import DataConfig
from owpo_megatron.data import PromptTemplate, load_prompts
from owpo_megatron.data.problem import Problem
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.data.templates import COMPLETION
from owpo_megatron.data.tokenizer import Tokenizer


def problem(text="hi", **fields):
    return Problem("p1", text, "42", "math", **fields)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "<s> <s> $A"])
@pytest.mark.parametrize("template", ["raw", "completion"])
def test_a_plain_text_begins_with_what_the_tokenizer_puts_there(single, template):
    """Encoding equals Hugging Face's own call, without the eos token that some append."""
    backend = with_bos(single)
    prompt = PromptTemplate(template, Tokenizer(backend)).prompt(problem())
    whole = tuple(backend.encode(prompt.text))
    assert prompt.token_ids == (whole[:-1] if single.endswith("</s>") else whole)
    assert prompt.token_ids[0] == backend.bos_token_id and backend.eos_token_id not in prompt.token_ids


def test_never_twice():
    tokenizer = Tokenizer(with_bos())
    (bos,) = tokenizer.bos_ids
    for text in ("<s>hi", "<s><s>hi", "hi"):
        assert tokenizer.encode(text, bos=True).count(bos) == 1, text
    assert tokenizer.encode("<s><s>hi").count(bos) == 1 and tokenizer.encode("hi").count(bos) == 0
    assert PromptTemplate("raw", tokenizer).prompt(problem(token_ids=(bos, 5))).token_ids == (bos, 5)


def byte_level(single):
    """Llama 3: a sequence of post-processors; GLM: two tokens in front; some put their eos token there."""
    marks = ("<s>", "</s>", "[gMASK]", "<sop>")
    backend = make_byte_tokenizer(270).backend_tokenizer
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    ids = [(mark, backend.token_to_id(mark)) for mark in marks]
    template = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)


def metaspace(scheme):
    """Llama 2, Mistral, Gemma: a space in front of the text, always, at its start, or never."""
    characters = ["<unk>", "<s>", "</s>", "\u2581", *sorted(set(COMPLETION) - {"{", "}", " "}), "{", "}"]
    backend = Backend(models.BPE({one: place for place, one in enumerate(characters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    ids = [("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", ["raw", "completion"])
@pytest.mark.parametrize(
    "backend",
    [byte_level("<s> $A"), byte_level("[gMASK] <sop> $A"), byte_level("</s> $A"), byte_level("<s> $A </s>")]
    + [metaspace(scheme) for scheme in ("always", "first", "never")],
    ids=["llama3", "glm", "eos in front", "bert", "always", "first", "never"],
)  # fmt: skip
def test_every_kind_of_tokenizer_begins_as_its_own_call_does(backend, template):
    tokenizer = Tokenizer(backend)
    made = PromptTemplate(template, tokenizer)
    whole = backend.encode(made.prompt(problem()).text)
    ids = made.prompt(problem()).token_ids
    assert list(ids) == whole[: len(ids)] and set(whole[len(ids) :]) <= {backend.eos_token_id}
    bos = tokenizer.decode_all(tokenizer.bos_ids).strip()
    for text in (f"{bos}hi", f"{bos}{bos}hi", bos, ""):  # a text that begins with it gets no second one
        ids = PromptTemplate("raw", tokenizer).prompt(problem(text)).token_ids
        count = len(tokenizer.bos_ids)
        assert ids[:count] == tokenizer.bos_ids and not set(ids[count:]) & set(tokenizer.bos_ids), text


def test_a_part_of_what_belongs_in_front_is_completed():
    tokenizer = Tokenizer(byte_level("[gMASK] <sop> $A"))
    plain = tokenizer.encode("hi", bos=True)
    assert {tokenizer.encode(text, bos=True) for text in ("<sop>hi", "[gMASK]hi", "[gMASK]<sop>hi")} == {plain}


@pytest.mark.parametrize("template", ["<s>{{ messages[0].content }}", "{{ bos_token }}<s>{{ messages[0].content }}"])
def test_a_chat_templates_own_bos_is_there_once(template):
    tokenizer = Tokenizer(with_bos(template=template))
    for text in ("hi", "<s>hi"):
        ids = PromptTemplate("chat", tokenizer).prompt(problem(text)).token_ids
        assert ids[0] == tokenizer.bos_ids[0] and ids.count(ids[0]) == 1


@pytest.mark.parametrize("template", ["bos", "plain"])
def test_a_chat_template_has_it_or_not_as_it_likes(template):
    """The same ids as apply_chat_template gives."""
    backend = with_bos(template=TEMPLATES[template])
    made = PromptTemplate("chat", Tokenizer(backend))
    message = [{"role": "user", "content": "hi"}]
    theirs = backend.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(made.prompt(problem()).token_ids) == list(theirs)
    assert made.lacks_bos is (template == "plain")


def test_tokenizers_without_bos_add_nothing_and_the_report_says_what_is_there(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"problem": "q", "answer": 1}')
    data = DataConfig(source=str(tmp_path / "x.jsonl"))
    assert Tokenizer(make_byte_tokenizer()).bos_ids == ()
    assert "begin" not in str(load_prompts(data, Tokenizer(make_byte_tokenizer()))[1])
    assert "prompts begin with <s>" in str(load_prompts(data, Tokenizer(with_bos()))[1])
    plain = Tokenizer(with_bos(template=TEMPLATES["plain"]))
    report = load_prompts(data.model_copy(update={"template": "chat"}), plain)[1]
    assert "the chat template leaves out <s>" in str(report)
