"""The BOS token of a checkpoint's tokenizer."""

from dataclasses import dataclass
from pathlib import Path

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
