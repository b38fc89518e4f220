"""Pruning methods, one file each.

A file declares `METHOD = Method(score=..., statistic=...)`. Keyword-only arguments with a default are the method's
settings (`--set method.NAME=VALUE`); a setting that several functions name goes to all of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a solver removes from one linear.

    `removed` weights in all; with `group` > 0 the same number from every `group` aligned inputs of each row. A
    `rate` that is not None asks for the released code's own count at that rate instead of `removed`. Weights that are
    zero already are the first to go, all of them if they are more than that, unless they may `revive`: become numbers.
    """

    removed: int
    group: int = 0
    rate: float | None = None
    revive: bool = False
