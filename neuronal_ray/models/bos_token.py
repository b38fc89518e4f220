"""The BOS token of a checkpoint's tokenizer, and what stands for it where there is none."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from neuronal_ray.models.checkpoint import load_tokenizer


@dataclass(frozen=True)
class BosToken:
    """The id (None: there is no such token), and whether the tokenizer puts it in front of a text."""

    id: int | None
    added: bool


def bos_token(path: Path, *, trust_remote_code: bool = False) -> BosToken:
    """Return the BOS token of the tokenizer in `path`. Raises BadInput if there is no tokenizer."""
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    token: int | None = tokenizer.bos_token_id
    return BosToken(token, token is not None and tokenizer("a", verbose=False).input_ids[:1] == [token])


def context_prefix(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """Return the token that lm-eval puts before an empty context where the tokenizer has neither BOS nor EOS.

    None where it has one, which lm-eval takes. Otherwise the configuration's BOS, EOS or padding, else token 0.
    """
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = [number for name in names if isinstance(number := config.to_dict().get(name), int)]
    return next((number for number in known if 0 <= number < config.vocab_size), 0)
