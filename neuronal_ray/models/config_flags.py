"""Flags of a config.json that say how a forward is computed, not what: set to what is here, with one line."""

import functools
import logging
from pathlib import Path

from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_HERE = (None, "eager", "sdpa")
"""The implementations of attention that torch alone computes; others need a package or a kernel from the hub."""
_RETURNED = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def set_to_what_is_here(config: PretrainedConfig, path: Path) -> None:
    """Change flags of `config`, read from the directory `path`, by which a forward could not run or returns more.

    The file stays as it is, and so does what the model computes.
    """
    for part in (config, config.get_text_config()):
        asked = part._attn_implementation
        if asked not in _HERE:
            _say_once(f"attention {asked!r:.80}, which config.json in {path} asks for, is computed by torch here")
            part._attn_implementation = None  # transformers chooses
        for name, value in _RETURNED.items():
            if getattr(part, name) != value:
                _say_once(f"{name} of config.json in {path} is ignored here: it is {value}")
                setattr(part, name, value)


@functools.cache
def _say_once(line: str) -> None:
    """Warn once in a process, however often a configuration is read there."""
    logger.warning("--model: %s", line)
