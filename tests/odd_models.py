"""Tokenizers as the families have them, made from bytes: with BOS, with more tokens than the model, with templates."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from owpo_megatron.data.small_tokenizers import make_byte_tokenizer

TEMPLATES = {
    "plain": "{% for m in messages %}[{{m['role']}}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}[{{m['role']}}]{{ m['content'] }}{% endfor %}[assistant]",
    "raise": "{% if messages[0]['role'] != 'system' %}"
    "{{ raise_exception('Conversation must start with a system message') }}{% endif %}ok",
    "syntax": "{% for m in messages %}{{ m['content'] }",
    "think": "{% for m in messages %}[{{m['role']}}]{{ m['content'] }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}",
    "today": "{% for m in messages %}{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ m['content'] }}{% endfor %}A:",
    "undefined": "{% for m in messages %}{{ m['content'].nothing.there }}{% endfor %}",
}


def with_bos(
    single: str = "<s> $A", added: tuple[AddedToken, ...] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose post-processor adds special tokens to a plain text, as Llama's and Mistral's do."""
    backend = make_byte_tokenizer(270).backend_tokenizer
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens(list(added))
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


def folder(path: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int, template: str | None = None) -> Path:
    """An HF folder of a tokenizer and a config.json; no weights, which no check of prompts reads."""
    tokenizer.save_pretrained(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
    return path
