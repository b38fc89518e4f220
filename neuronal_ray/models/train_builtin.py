"""How are the built-in model, its calibration text and its evaluation text made?

Everything comes from text that CPython itself carries, so nothing is downloaded.
"""

import argparse
import ast
import copy
import hashlib
import math
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
HEAD_DIM = 32
QUERIES_PER_KEY = 3
SEQLEN = 256
SKIPPED_FOLDERS = frozenset(
    "test tests idlelib idle_test lib2to3 pydoc_data site-packages dist-packages _bundled".split()
)
HELD_OUT_RATE = 0.08
REPEAT_MIN_CHARACTERS = 60
CALIBRATION_BYTES = 450_000


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Number of optimizer steps, sequences per step, peak learning rate, steps between evaluations."""

    num_steps: int
    batch: int
    peak: float
    evaluate_every: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    step: int
    train_loss: float
    perplexity: float
    elapsed_s: float


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and its functions, in the order of `ast.walk`."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    return [text for text in texts if text]


def collect() -> Iterator[Document]:
    """One document a topic of `help()`, then one a module of the standard library, in sorted order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic {name}", topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    relative_paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for relative in relative_paths:
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            yield Document(f"module {relative.as_posix()}", "\n\n".join(docstrings((root / relative).read_bytes())))


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, without trailing spaces."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return [block.strip("\n") for block in "\n".join(lines).split("\n\n") if block.strip()]


def drop_repeats(documents: Iterator[Document]) -> list[Document]:
    """Keep the first copy of every paragraph, spacing aside; short ones may repeat in other documents."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        blocks = []
        for block in paragraphs(document.text):
            key = " ".join(block.split())
            if key not in seen:
                blocks.append(block)
            if len(key) >= REPEAT_MIN_CHARACTERS:
                seen.add(key)
        if blocks:
            kept.append(Document(document.name, "\n\n".join(blocks)))
    return kept


def name_fraction(document: Document) -> float:
    """A number in [0, 1) that depends on the document's name alone."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64


def split(documents: list[Document]) -> Corpus:
    """Sort by hash and cut: the same name falls on the same side on every machine."""
    ordered = sorted(documents, key=name_fraction)
    return Corpus(
        train=[document for document in ordered if name_fraction(document) >= HELD_OUT_RATE],
        held_out=[document for document in ordered if name_fraction(document) < HELD_OUT_RATE],
    )


def join(documents: list[Document], *, max_bytes: int) -> str:
    """The first documents that fit in `max_bytes` of UTF-8, with blank lines between them."""
    text = ""
    for document in documents:
        longer = f"{text}{document.text}\n\n"
        if len(longer.encode()) > max_bytes:
            break
        text = longer
    return text


def train_tokenizer(documents: list[Document], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without normalizing, so that decoding gives back the text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=1_000_000_000,
        clean_up_tokenization_spaces=False,
    )


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """`<s> document </s>` for each document, `[tokens]`."""
    ids: list[int] = []
    for document in documents:
        ids += [BOS_ID, *tokenizer(document.text).input_ids, EOS_ID]
    return torch.tensor(ids)


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """Consecutive windows `[windows, SEQLEN]` of `tokens` `[tokens]`; the remainder is dropped."""
    num_windows = len(tokens) // SEQLEN
    return tokens[: num_windows * SEQLEN].reshape(num_windows, SEQLEN)


def make_model(*, hidden: int, blocks: int, vocabulary: int) -> LlamaForCausalLM:
    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // QUERIES_PER_KEY,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """exp of the mean loss of the windows of `tokens` `[tokens]`."""
    total = 0.0
    batches = windows(tokens).split(16)
    for batch in batches:
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / sum(len(batch) for batch in batches))


def training_batches(tokens: torch.Tensor, schedule: Schedule) -> Iterator[torch.Tensor]:
    """Endless batches `[batch, SEQLEN]`: each epoch shifts the windows and shuffles them."""
    generator = torch.Generator().manual_seed(schedule.seed)
    while True:
        offset = int(torch.randint(SEQLEN, (), generator=generator))
        epoch = windows(tokens[offset:])
        order = torch.randperm(len(epoch), generator=generator)
        yield from (epoch[rows] for rows in order.split(schedule.batch) if len(rows) == schedule.batch)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a twentieth of the peak."""
    warm_up = max(1, schedule.num_steps // 20)
    if step < warm_up:
        return schedule.peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, schedule.num_steps - warm_up)
    return schedule.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
