"""Refinements, one file each: another mask with as many weights removed from every row.

A refinement module defines `refine(weight, score, mask, inputs, group) -> mask`: weight [rows, columns], the method's
score float32 [rows, columns], mask bool [rows, columns], True where weights go, `inputs` the statistic of kind
`STATISTIC`, `group` the length of a pattern's groups of inputs (0: no pattern; else the counts of each group stay too).
Keyword-only arguments are its settings (`--set refinement.NAME=VALUE`).
`PARTS` are the parts of a block (see LinearSpec.part) whose masks it refines; the others keep theirs.
"""
