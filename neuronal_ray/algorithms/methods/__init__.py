"""Pruning methods, one file each.

A method module defines `score(weight, inputs) -> score`: weight [rows, columns] in any float dtype, `inputs` the
statistic of the linear's calibration inputs, result float32 [rows, columns], larger where weights stay.
`STATISTIC` is the kind of statistic that the score reads; None says that it needs no calibration text.

A module whose `SOLVES` is True changes the weights that stay, too. It also defines `factorize(inputs) -> factor`, the
work that all linears with one input and all candidates share (BadInput when it cannot be done), and
`solve(weight, factor, quota) -> weight`, float32 [rows, columns] with at least `quota.removed` zeros.

Keyword-only arguments are settings (`--set method.NAME=VALUE`); one named by several functions goes to all of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a solver is to remove from one linear.

    `removed` weights in all; with `group` > 0 the same number from every `group` aligned inputs of each row. A
    `rate` that is not None asks for the released code's own count at that rate instead of `removed`.
    """

    removed: int
    group: int = 0
    rate: float | None = None
