"""A tokenizer's special tokens are in a text once, and documents have an end."""

import json
from pathlib import Path

import pytest
from tiny import write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neuronal_ray.data.encoder import ChatError
from neuronal_ray.models.encoder import load_encoder


def test_a_text_gets_one_bos_and_a_second_one_is_not_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(tmp_path)
    encode = load_encoder(tmp_path)
    plain = encode("cat")
    assert plain[0] == 0
    assert not caplog.messages
    with caplog.at_level("INFO"):
        assert encode("<s>cat") == plain
        assert encode("<s>cat") == plain
    (line,) = caplog.messages
    assert "<s>" in line, line
    assert encode("<s><s>cat") == [0, *plain], "what the text has twice stays"


def test_documents_end_where_the_next_one_begins_or_with_eos(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "bos")
    assert load_encoder(tmp_path / "bos").end_of_document() == []
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, specials, expected in (("eos", {"eos_token": "</s>"}, [1]), ("none", {}, [])):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert ("eos_token" in config) == bool(specials), config
        assert load_encoder(tmp_path / name).end_of_document() == expected, name


def test_a_chat_is_written_as_the_template_has_it_with_one_bos(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "none")
    write_tokenizer(tmp_path / "chat")
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "sat"}]
    with pytest.raises(ChatError, match="has no chat template"):
        load_encoder(tmp_path / "none").chat_text(chat)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    write = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(refuse + write)
    encode = load_encoder(tmp_path / "chat")
    assert encode.chat_text(chat) == "<s>user: cat\nassistant: sat\n"
    assert encode(encode.chat_text(chat)) == encode("user: cat\nassistant: sat\n")
    with pytest.raises(ChatError, match="no system"):
        encode.chat_text([{"role": "system", "content": "a"}])
