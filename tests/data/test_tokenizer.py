"""The tokenizers survive a save and a load by transformers' AutoTokenizer. The engine's own load is not run here."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3Config

from owpo_megatron.data.small_tokenizers import make_byte_tokenizer, make_character_tokenizer, padded_vocab_size
from owpo_megatron.data.tasks import TASKS
from owpo_megatron.data.tokenizer import load_tokenizer
from owpo_megatron.errors import UserError


def _checkpoint(folder, tokenizer):
    """A folder like a model's: AutoTokenizer must not take Qwen3's own tokenizer because of config.json."""
    tokenizer.save_pretrained(folder)
    Qwen3Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return load_tokenizer(_checkpoint(tmp_path_factory.mktemp("bytes"), make_byte_tokenizer(272)))


def test_characters_by_hand(tmp_path):
    """Specials are 0, 1, 2; then the alphabet in order: a=3, b=4, space=5."""
    _checkpoint(tmp_path, make_character_tokenizer("ab ", vocab_size=16))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("b a") == (4, 5, 3)
    assert tokenizer.decode((4, 5, 3, 0)) == "b a"
    assert tokenizer.eos_ids == (0,) and tokenizer.pad_id == 1 and len(tokenizer) == 16


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_reads_back_through_auto_tokenizer(tmp_path, name):
    task = TASKS[name]
    _checkpoint(tmp_path, make_character_tokenizer(task.alphabet))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for problem in task.problems("test")[:50]:
        ids = tokenizer.encode(problem.text, add_special_tokens=False)
        assert len(ids) == len(problem.text)
        assert tokenizer.decode(ids) == problem.text


def test_a_padding_token_of_the_vocabulary_shows_in_the_text(tmp_path):
    """Were it dropped, `a<unused>b` would pass for `ab`."""
    _checkpoint(tmp_path, make_character_tokenizer("ab", vocab_size=16))
    assert load_tokenizer(tmp_path).decode((3, 9, 4)) == "a<unused_4>b"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_bytes_round_trip(byte_tokenizer, text):
    assume("<eos>" not in text and "<pad>" not in text)
    ids = byte_tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert byte_tokenizer.decode(ids + byte_tokenizer.eos_ids) == text


def test_a_spelled_special_token_is_one(byte_tokenizer):
    """Chat templates need it; a problem's text can do it too."""
    assert byte_tokenizer.encode("<eos>") == byte_tokenizer.eos_ids


def test_eos_ids_come_from_generation_config_too(tmp_path):
    _checkpoint(tmp_path, make_character_tokenizer("ab"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 0]}))
    assert load_tokenizer(tmp_path).eos_ids == (0, 4)


def test_unknown_characters_are_refused(tmp_path):
    _checkpoint(tmp_path, make_character_tokenizer("ab"))
    with pytest.raises(UserError, match="data.source = 'abc': .* does not know all of these characters"):
        load_tokenizer(tmp_path).encode("abc")


def test_missing_folder_and_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="model.path = .*nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_makers_refuse_what_cannot_work():
    with pytest.raises(ValueError, match="twice"):
        make_character_tokenizer("aba")
    with pytest.raises(ValueError, match="too small"):
        make_character_tokenizer("ab", vocab_size=4)


def test_padded_vocab_size():
    """3 specials and 13 characters fill 16 exactly; one more needs 32."""
    assert padded_vocab_size(make_character_tokenizer("abcdefghijklm")) == 16
    assert padded_vocab_size(make_character_tokenizer("abcdefghijklmn")) == 32
