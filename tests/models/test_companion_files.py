"""The files beside the weights: those that transformers, vLLM or a person reads are copied, stale ones are not."""

import logging
import os
from pathlib import Path

import pytest
from tiny import write_tokenizer
from transformers import AutoTokenizer

from neuronal_ray.models.companion_files import companions, copy_companions

BELONG = """
    config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    added_tokens.json tokenizer.model tokenizer.model.v3 tekken.json spiece.model sentencepiece.bpe.model
    qwen.tiktoken vocab.bpe bpe.codes vocab.spm source.spm vocab.json vocab.txt merges.txt dict.txt emoji.json
    chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja preprocessor_config.json
    processor_config.json video_preprocessor_config.json modeling_own.py custom_generate/generate.py
    custom_generate/requirements.txt qformer_tokenizer/vocab.txt LICENSE LICENSE.txt License.pdf NOTICE
    Notice.txt COPYING USE_POLICY.md README.md LICENSES/MIT/LICENSE
"""
STALE = """
    model.safetensors pytorch_model.bin pytorch_model.bin.index.json model.safetensors.index.json
    model.safetensors.index.fp16.json model.fp16.safetensors consolidated.safetensors consolidated.00.pth
    params.json flax_model.msgpack tf_model.h5 model.gguf model.onnx model.onnx_data rust_model.ot
    adapter_config.json adapter_model.safetensors quantize_config.json training_args.bin optimizer.pt
    trainer_state.json pruning.json original/params.json original/consolidated.00.pth original/tokenizer.model
    openvino/openvino_model.bin openvino/openvino_model.xml openvino/tokenizer.json onnx/decoder/model.onnx
    onnx/config.json .gitattributes .cache/config.json __pycache__/modeling_own.py report.html
    allocation.parquet figure.png
"""


def test_what_is_read_belongs_to_the_model_and_what_is_stale_does_not() -> None:
    belong = BELONG.split()
    found = companions([*belong, *STALE.split()])
    assert found == sorted(belong), set(found) ^ set(belong)
    assert "params.json" in companions(["params.json", "config.json"])  # stale only beside consolidated weights


def test_a_tokenizer_keeps_its_chat_templates(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "copy").mkdir()
    copy_companions(tmp_path, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == tokenizer.chat_template


def test_only_what_is_read_is_copied_through_links_to_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target, other = (tmp_path / name for name in ("model", "copy", "elsewhere"))
    for folder in (source, target, other):
        folder.mkdir()
    for name in ("config.json", "tokenizer.model", "notes.txt", "modeling_own.py", "data.json"):
        (other / name).write_text(name)
        (source / name).symlink_to(other / name)
    (source / "README.md").write_text("a model")
    (source / "LICENSE").symlink_to("README.md")
    (source / "NOTICE").symlink_to("absent")
    (source / "all.json").symlink_to("all.json")
    (source / "old.txt").symlink_to("/dev/zero")
    (source / "texts").symlink_to(other)
    os.mkfifo(source / "pipe.txt")
    with caplog.at_level(logging.WARNING):
        copy_companions(source, target)
    assert sorted(file.name for file in target.iterdir()) == ["LICENSE", "README.md", "config.json", "tokenizer.model"]
    assert not any(file.is_symlink() for file in target.iterdir())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"--model: not copied from {source}: 'texts' (a link to a directory), "), line
    assert line.endswith(" and 4 more"), line


@pytest.mark.parametrize("where", ["the cache", "another cache"])
def test_links_of_the_hubs_cache_are_copied(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--owner--name"
    source = repository / "snapshots" / "0123" if where == "another cache" else tmp_path / "model"
    blobs, target = repository / "blobs", tmp_path / "copy"
    for folder in (source, blobs, target):
        folder.mkdir(parents=True)
    (blobs / "4567").write_text("a model")
    (source / "README.md").symlink_to(blobs / "4567")
    if where == "the cache":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    copy_companions(source, target)
    assert (target / "README.md").read_text() == "a model"
