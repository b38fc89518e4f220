"""Does the dry run refuse what the run refuses, as far as shapes tell, and give times that people read?"""

from pathlib import Path

import pytest
import torch
from tiny import prune_arguments, write_model, write_texts, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from neuronal_ray.cli.options import parse_config
from neuronal_ray.prune.__main__ import main
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.dry_run import duration, time_needed, tokens_by_stage
from neuronal_ray.prune.inputs import Reader

TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    write_model(folder / "model")
    write_texts(folder)
    return folder


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"), (0.2, "1 s"), (1.4, "1 s"), (19.6, "20 s"), (21, "20 s"), (43, "45 s"), (87, "85 s"), (91, "2 min"),
        (150, "2 min"), (19 * 60, "19 min"), (24 * 60, "25 min"), (61 * 60, "60 min"), (86 * 60, "85 min"),
        (88 * 60, "1 h 30 min"), (120 * 60, "2 h"), (4 * 3600 + 8 * 60, "4 h 10 min"),
        (12 * 3600 - 1, "12 h"), (47.9 * 3600, "47 h 50 min"), (48 * 3600, "2 days"), (76 * 3600, "3 days 4 h"),
        (30 * 86400 + 3599, "30 days 1 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_durations_never_go_back() -> None:
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    last = 0
    for step in range(1, 2000):
        seconds = 1.01**step / 10
        words = duration(seconds).split()
        value = sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
        assert value >= last, (seconds, words)
        assert seconds < 1 or 0.65 * seconds <= value <= 1.5 * seconds, (seconds, words)
        last = value
        if seconds > 1e8:
            break


def test_a_long_run_is_offered_with_less_text(folder: Path) -> None:
    arguments = prune_arguments(folder, folder / "out", calibration_samples="60", evaluate="none")
    config = parse_config(PruneConfig, arguments, prog="test", description="")
    inputs = Reader().prepare(config)
    total = sum(tokens_by_stage(config, inputs).values())
    assert "; at " not in time_needed(config, inputs, seconds_per_token=500 / total)
    assert time_needed(config, inputs, seconds_per_token=500 / total).startswith("about 8 min at ")
    long = time_needed(config, inputs, seconds_per_token=15000 / total)
    assert long.startswith("about 4 h 10 min at the speed of"), long
    assert f"at --calibration-samples 32 --sequence-length {TOKENS} about 2 h" in long, long


def test_no_less_text_is_offered_where_it_changes_little(folder: Path) -> None:
    arguments = prune_arguments(folder, folder / "out")
    config = parse_config(PruneConfig, arguments, prog="test", description="")
    assert "; at " not in time_needed(config, Reader().prepare(config), seconds_per_token=100)


def test_experts_in_one_product_are_refused_before_weights_are_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=128, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=1, max_position_embeddings=64, interleave_moe_layer_step=1, attention_chunk_size=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    for more in ({"dry_run": ""}, {}):
        arguments = prune_arguments(folder, tmp_path / "out", model=str(tmp_path / "model"), **more)
        assert main(arguments) == 2, more
        error = capsys.readouterr().err.splitlines()[-1]
        assert "passes the experts of gate_up_proj to bmm" in error, error
