"""The built-in model is a real language model, and its evaluation text is unseen."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import neuronal_ray
from neuronal_ray.models import train_builtin

BUILTIN = Path(neuronal_ray.__file__).parent / "data" / "builtin"
MODEL = BUILTIN / "model"
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
WINDOW = 256


@pytest.fixture(scope="module")
def evaluation() -> str:
    return (BUILTIN / "evaluation.txt").read_bytes().decode("utf-8")


@pytest.fixture(scope="module")
def calibration() -> str:
    return (BUILTIN / "calibration.txt").read_bytes().decode("utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerBase, evaluation: str) -> torch.Tensor:
    """`[windows, WINDOW]`, the remainder dropped."""
    tokens = torch.tensor(tokenizer(evaluation).input_ids)
    num_windows = len(tokens) // WINDOW
    return tokens[: num_windows * WINDOW].reshape(num_windows, WINDOW)


@pytest.fixture(scope="module")
def perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    losses = []
    with torch.no_grad():
        for batch in windows.split(16):
            logits = model(batch).logits[:, :-1].transpose(1, 2)  # [windows, vocabulary, WINDOW - 1]
            losses.append(cross_entropy(logits, batch[:, 1:], reduction="none").mean(dim=1))
    return math.exp(torch.cat(losses).double().mean().item())


def test_the_folder_holds_the_files_of_one_small_checkpoint() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == MODEL_FILES, sizes
    assert max(sizes.values()) < 6_000_000, sizes


def test_the_text_is_large_enough_to_calibrate_and_to_measure(calibration: str, evaluation: str) -> None:
    sizes = len(calibration.encode()), len(evaluation.encode())
    assert 400_000 <= sizes[0] <= 500_000, sizes
    assert 150_000 <= sizes[1] <= 250_000, sizes


def test_queries_share_keys_and_the_embedding_is_tied(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads, config
    assert config.num_attention_heads % config.num_key_value_heads == 0, config
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_weights_are_stored_in_bfloat16() -> None:
    stored = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


def test_decoding_gives_the_evaluation_text_back(tokenizer: PreTrainedTokenizerBase, evaluation: str) -> None:
    ids = tokenizer(evaluation).input_ids
    assert tokenizer.decode(ids) == evaluation
    assert tokenizer.bos_token_id == 0
    assert 0 not in ids, "the tokenizer added <s>"
    assert len(ids) < tokenizer.model_max_length, "transformers would warn about the length"


def test_held_out_perplexity_is_the_documented_one(perplexity: float) -> None:
    found = re.search(r"\| this model \| ([\d.]+) \|", (BUILTIN / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    assert perplexity == pytest.approx(float(found[1]), rel=0.01)


def test_the_model_learned_more_than_token_frequencies(
    perplexity: float, windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, calibration: str
) -> None:
    ids = torch.tensor(tokenizer(calibration).input_ids)
    counts = torch.bincount(ids, minlength=len(tokenizer)).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[windows[:, 1:]].mean().item())
    assert perplexity < unigram / 2, (perplexity, unigram)


def test_calibration_and_evaluation_share_no_long_paragraph(calibration: str, evaluation: str) -> None:
    shared = set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert not [paragraph for paragraph in shared if len(paragraph) > 200]


def test_the_script_writes_a_model_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--hidden", "96", "--blocks", "1", "--vocabulary", "512"]
    train_builtin.main(["--output", str(tmp_path), "--steps", "2", *shape])
    assert "held-out perplexity: saved model" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "model").iterdir()} == MODEL_FILES
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert made.config.vocab_size == len(tokenizer) == 512
    for name in ("calibration.txt", "evaluation.txt"):
        text = (tmp_path / name).read_bytes().decode("utf-8")
        assert tokenizer.decode(tokenizer(text).input_ids) == text, name


@pytest.mark.parametrize("family", train_builtin.FAMILIES)
def test_every_family_can_be_made(family: str) -> None:
    model = train_builtin.make_model(family, hidden=96, blocks=2, vocabulary=300)
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == 2
    assert model.get_input_embeddings().weight.shape == (300, 96)
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_script_refuses_a_partial_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_builtin.main(["--output", str(tmp_path / "new"), "--hidden", "100"])
    assert "--hidden 100" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
