"""A tiny LLaMA with a byte tokenizer, the texts that go with it, and the command line that prunes it in a second."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.plan import Plan
from neuronal_ray.models.output_files import copy_rest, plan_output_files
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.model_files import write
from neuronal_ray.workers.worker import Worker

CONTEXT = 64
VOCABULARY = 128
LENGTH = 32
WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "owl",
    "sat",
    "ran",
    "flew",
    "over",
    "under",
    "hill",
    "river",
    "and",
    "old",
    "it",
    "saw",
)


def write_tokenizer(path: Path) -> None:
    """Bytes as tokens, a BOS token in front, as LLaMA's tokenizer has it."""
    alphabet = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(symbol) < 127]
    specials = ["<s>", "</s>"]
    vocabulary = {symbol: index for index, symbol in enumerate([*specials, *alphabet, "\u0120", "\u010a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)


def write_model(path: Path, *, dtype: torch.dtype = torch.float32, scale: float = 0.2, **config: int) -> Path:
    """Three blocks, grouped queries, random weights large enough for the blocks to matter."""
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    shape = LlamaConfig(**(values | config), initializer_range=scale, tie_word_embeddings=False)
    LlamaForCausalLM(shape).to(dtype).save_pretrained(path)
    write_tokenizer(path)
    return path


def some_text(seed: int, num_words: int) -> str:
    """Running text of `num_words` words."""
    source = random.Random(seed)
    return " ".join(source.choices(WORDS, k=num_words)) + "."


def write_texts(folder: Path) -> None:
    """calibration.txt, evaluation.txt and other.txt."""
    for seed, name in enumerate(("calibration", "evaluation", "other")):
        (folder / f"{name}.txt").write_text(some_text(seed, 400 if name == "calibration" else 120))


def prune_arguments(folder: Path, output: Path | str, **changes: str | None) -> list[str]:
    """A quick run on `folder`'s model and texts; `changes` by option name, "" for a switch, None to leave out."""
    options: dict[str, str | None] = {
        "model": str(folder / "model"),
        "output": str(output),
        "sparsity": "0.6",
        "calibration": str(folder / "calibration.txt"),
        "evaluate": str(folder / "evaluation.txt"),
        "calibration_samples": "6",
        "search_samples": "2",
        "sequence_length": str(LENGTH),
        "block_lambdas": "0.05,0.15",
        "row_lambdas": "0,0.1",
        "threads": "1",
        "mode": "paper",
        "address": "none",
    } | changes
    words = [("--" + name.replace("_", "-"), value) for name, value in options.items() if value is not None]
    return [word for pair in words for word in pair if word]


def cpu_spec(
    path: Path, pruner: LinearPruner, *, dtype: str = "float32", threads: int | None = 1, **more: int
) -> WorkerSpec:
    """Of a worker on the CPU; `more` are its shards, and whether its blocks visit."""
    return WorkerSpec(
        model_path=path, device="cpu", dtype=dtype, pruner=pruner, threads=threads, trust_remote_code=False, **more
    )


def write_pruned(worker: Worker, plan: Plan, target: Path) -> int:
    """The final model under `plan` as a directory, as the pipeline writes it; the zeros of its linears."""
    checkpoint = worker.replica.checkpoint
    parts = plan_output_files(checkpoint, worker.layout, [worker.blocks])
    zeros = sum(write(worker, part, plan, target) for part in parts)
    copy_rest(checkpoint, parts, target)
    return zeros
