"""The script that made the built-in model: tokenizer, training, and the calibration and evaluation text."""

import argparse
import copy
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from neuronal_ray.models.builtin_text import Document, collect, drop_repeats, first_fitting, join, split

FAMILIES = ("llama", "qwen3", "opt", "phi", "gpt_neox")
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
HEAD_DIM = 32
QUERIES_PER_KEY = 3
SEQLEN = 256
CALIBRATION_BYTES = 450_000
BATCH = 16
PEAK_RATE = 3e-3
NUM_EVALUATIONS = 20
BIGRAM_PRIOR = 64.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A report on the training: the mean loss since the last report, and the perplexity of the held-out tokens."""

    step: int
    train_loss: float
    perplexity: float
    elapsed_s: float


def train_tokenizer(documents: list[Document], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE without normalization, so that decoding restores the text exactly."""
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
    """Return `<s> document </s>` for each document, `[tokens]`."""
    ids: list[int] = []
    for document in documents:
        ids += [BOS_ID, *tokenizer(document.text).input_ids, EOS_ID]
    return torch.tensor(ids)


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """Divide `tokens` `[tokens]` into consecutive windows `[windows, SEQLEN]`, dropping the remainder."""
    num_windows = len(tokens) // SEQLEN
    return tokens[: num_windows * SEQLEN].reshape(num_windows, SEQLEN)


def _shape(family: str, *, hidden: int, heads: int) -> dict[str, object]:
    """Return the widths and special settings of a family, under the names of its configuration."""
    grouped: dict[str, object] = {"num_key_value_heads": heads // QUERIES_PER_KEY, "intermediate_size": hidden * 8 // 3}
    shapes: dict[str, dict[str, object]] = {
        "llama": grouped | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        "qwen3": grouped | {"head_dim": HEAD_DIM, "rms_norm_eps": 1e-5},
        "opt": {"ffn_dim": hidden * 4, "word_embed_proj_dim": hidden, "dropout": 0.0},
        "phi": {"intermediate_size": hidden * 4, "partial_rotary_factor": 0.5},
        "gpt_neox": {"intermediate_size": hidden * 4, "use_parallel_residual": True, "rotary_pct": 0.25},
    }
    return shapes[family]


def make_model(family: str, *, hidden: int, blocks: int, vocabulary: int) -> PreTrainedModel:
    """Make a model of the family with random weights."""
    heads = hidden // HEAD_DIM
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        **_shape(family, hidden=hidden, heads=heads),
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return exp of the mean loss of the windows of `tokens` `[tokens]`."""
    total = 0.0
    rows = windows(tokens)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]  # [batch, SEQLEN]
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / len(rows))


def unigram_perplexity(train: torch.Tensor, tokens: torch.Tensor, *, vocabulary: int) -> float:
    """Return the perplexity of the same targets under the add-one frequencies of `train` `[tokens]`."""
    counts = torch.bincount(train[train > EOS_ID], minlength=vocabulary).double() + 1
    targets = windows(tokens)[:, 1:]
    return math.exp(-(counts / counts.sum()).log()[targets].mean().item())


def bigram_perplexity(train: torch.Tensor, tokens: torch.Tensor, *, vocabulary: int) -> float:
    """Return the perplexity of the same targets under pair counts of `train` plus `BIGRAM_PRIOR` unigram draws."""
    unigram = torch.bincount(train, minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2)
    counts = pairs.reshape(vocabulary, vocabulary).double() + BIGRAM_PRIOR * unigram
    rows = windows(tokens)
    chances = counts[rows[:, :-1], rows[:, 1:]] / counts.sum(dim=1)[rows[:, :-1]]
    return math.exp(-chances.log().mean().item())


def training_batches(tokens: torch.Tensor, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield endless batches `[BATCH, SEQLEN]`: each epoch shifts the windows and shuffles them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQLEN, (), generator=generator))
        epoch = windows(tokens[offset:])
        order = torch.randperm(len(epoch), generator=generator)
        for start in range(0, len(epoch) - BATCH + 1, BATCH):
            yield epoch[order[start : start + BATCH]]


def rate_factor(step: int, *, steps: int) -> float:
    """Return the factor of the rate: linear warm-up over 1/20 of the steps, then a cosine down to 1/20 of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW with weight decay for the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel,
    batches: Iterator[torch.Tensor],
    *,
    held_out: torch.Tensor,
    steps: int,
    report: Callable[[Progress], None],
) -> None:
    """Train in bfloat16 autocast; end with the weights that were best on `held_out` `[tokens]`."""
    started = time.monotonic()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, steps=steps))
    best, best_state = math.inf, copy.deepcopy(model.state_dict())
    losses: list[float] = []
    for step, batch in enumerate(islice(batches, steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step % max(1, steps // NUM_EVALUATIONS) == 0 or step == steps:
            current = perplexity(model, held_out)
            if current < best:
                best, best_state = current, copy.deepcopy(model.state_dict())
            elapsed_s = time.monotonic() - started
            train_loss = sum(losses) / len(losses)
            report(Progress(step=step, train_loss=train_loss, perplexity=current, elapsed_s=elapsed_s))
            losses.clear()
    model.load_state_dict(best_state)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer."""
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m neuronal_ray.models.train_builtin",
        description="Make the built-in model and its text from CPython's documentation: the topics of help() and "
        "the docstrings of the standard library. Nothing is downloaded. Writes OUTPUT/model/, OUTPUT/calibration.txt "
        "(documents of the training part) and OUTPUT/evaluation.txt (documents held out, selected by a hash of their "
        "names), replacing existing files.",
        epilog="The text, and so every number, depends on the Python version. For a quick trial: "
        "--output /tmp/tiny --steps 20 --hidden 96 --blocks 2 --vocabulary 512",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write, created if missing")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="architecture [llama]")
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps of 16 x 256 tokens [1400]")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, a multiple of 96 [192]")
    parser.add_argument("--blocks", type=int, default=6, help="transformer blocks [6]")
    parser.add_argument("--vocabulary", type=int, default=2048, help="number of tokens, at least 258 [2048]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order of the text [0]")
    arguments = parser.parse_args(argv)
    if arguments.hidden < 96 or arguments.hidden % (HEAD_DIM * QUERIES_PER_KEY):
        parser.error(f"--hidden {arguments.hidden}: expected a positive multiple of 96")
    if arguments.vocabulary < 258:
        parser.error(f"--vocabulary {arguments.vocabulary}: expected at least 258 (256 bytes, 2 special)")
    if arguments.steps < 1 or arguments.blocks < 1:
        parser.error("--steps and --blocks: expected at least 1")
    return arguments


def print_progress(progress: Progress) -> None:
    print(
        f"step {progress.step:5d}  training loss {progress.train_loss:.3f}  "
        f"held-out perplexity {progress.perplexity:.2f}  {progress.elapsed_s:.0f} s",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    torch.manual_seed(arguments.seed)
    corpus = split(drop_repeats(collect()))
    calibration = join(first_fitting(corpus.train, max_bytes=CALIBRATION_BYTES))
    evaluation = join(corpus.held_out)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "calibration.txt").write_text(calibration, encoding="utf-8")
    (arguments.output / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    print(f"Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print(f"trained on {len(corpus.train)} documents, {len(join(corpus.train).encode())} bytes")
    print(f"held out {len(corpus.held_out)} documents, {len(evaluation.encode())} bytes")

    tokenizer = train_tokenizer(corpus.train, vocabulary=arguments.vocabulary)
    stream = token_stream(corpus.train, tokenizer)
    held_out = torch.tensor(tokenizer(evaluation).input_ids)
    print(f"{len(stream)} training tokens, {len(held_out)} held-out tokens")

    model = make_model(
        arguments.family, hidden=arguments.hidden, blocks=arguments.blocks, vocabulary=arguments.vocabulary
    )
    print(f"{model.num_parameters()} parameters")
    batches = training_batches(stream, seed=arguments.seed)
    train(model, batches, held_out=held_out, steps=arguments.steps, report=print_progress)
    save_model(model, tokenizer, arguments.output / "model")

    saved = AutoModelForCausalLM.from_pretrained(arguments.output / "model", dtype=torch.float32)
    unigram = unigram_perplexity(stream, held_out, vocabulary=arguments.vocabulary)
    bigram = bigram_perplexity(stream, held_out, vocabulary=arguments.vocabulary)
    print(f"tokens seen {arguments.steps * BATCH * SEQLEN}")
    print(f"held-out perplexity: saved model {perplexity(saved, held_out):.3f}")
    print(f"held-out perplexity: unigram {unigram:.1f}, bigram {bigram:.1f}")


if __name__ == "__main__":
    main()
