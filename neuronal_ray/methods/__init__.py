"""Pruning methods, one file each.

A method module defines `score(weight, inputs) -> score`: weight [rows, columns] in any float dtype, `inputs` the
statistic of the linear's calibration inputs, result float32 [rows, columns], larger where weights stay.
Keyword-only arguments are its settings (`--set method.NAME=VALUE`). `NEEDS_INPUTS` says whether calibration
text must be read for the score.
"""
