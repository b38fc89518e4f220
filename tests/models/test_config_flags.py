"""A configuration that asks for what is not here: computed with what is, said once, the file as it was."""

import json
import logging
from pathlib import Path

import pytest
import torch

from neuronal_ray.models.checkpoint import load_model, open_checkpoint

TOKENS = torch.arange(3, 15).reshape(2, 6)


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(open_checkpoint(path), device=torch.device("cpu"), dtype=torch.float32)
    logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "attention 'flash_attention_2'"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attention 'kernels-community/flash-attn'"),
        ({"return_dict": False}, "return_dict"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True, "attn_implementation": "eager"}, "output_attentions"),
    ],
)
def test_what_is_not_here_is_computed_by_what_is(
    flags: dict[str, object], said: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits_of(folder)
    file = folder / "config.json"
    text = json.dumps(json.loads(file.read_text()) | flags)
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        found = logits_of(folder)
    torch.testing.assert_close(found, expected)
    assert said in caplog.text
    assert file.read_text() == text
