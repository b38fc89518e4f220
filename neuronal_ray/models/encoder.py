"""A checkpoint's tokenizer as this package uses it."""

import logging
from pathlib import Path

from neuronal_ray.data.documents import Conversation
from neuronal_ray.data.encoder import ChatError
from neuronal_ray.models.checkpoint import load_tokenizer

logger = logging.getLogger(__name__)


class TokenizerEncoder:
    """Text to the checkpoint's token ids, special tokens included. The tokenizer is loaded when it is first needed."""

    def __init__(self, path: Path, *, trust_remote_code: bool) -> None:
        self._path, self._trust_remote_code = path, trust_remote_code
        self._said_bos = False

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text. A text that begins with BOS gets no second one, which is said once."""
        tokenizer = load_tokenizer(self._path, trust_remote_code=self._trust_remote_code)
        tokens: list[int] = tokenizer(text, verbose=False).input_ids
        bos = tokenizer.bos_token_id
        if bos is None or tokens[:2] != [bos, bos]:
            return tokens
        if not self._said_bos:
            logger.warning("text begins with %s, which the tokenizer adds: it is not added again", tokenizer.bos_token)
            self._said_bos = True
        return tokens[1:]

    def end_of_document(self) -> list[int]:
        """Return EOS where the tokenizer adds no special token to a text and has one, otherwise nothing."""
        tokenizer = load_tokenizer(self._path, trust_remote_code=self._trust_remote_code)
        if tokenizer.eos_token_id is None or tokenizer("", verbose=False).input_ids:
            return []
        return [tokenizer.eos_token_id]

    def chat_text(self, conversation: Conversation) -> str:
        """Return a chat as the tokenizer's chat template writes it. Raises ChatError if it has none or refuses it."""
        tokenizer = load_tokenizer(self._path, trust_remote_code=self._trust_remote_code)
        if not tokenizer.chat_template:
            raise ChatError(f"the tokenizer in {self._path} has no chat template")
        try:
            text: str = tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # the template is a program of the model's author
            raise ChatError(f"{type(error).__name__}: {error}") from error
        return text


def load_encoder(path: Path, *, trust_remote_code: bool = False) -> TokenizerEncoder:
    """Return the encoder of the checkpoint in `path`."""
    return TokenizerEncoder(path, trust_remote_code=trust_remote_code)
