"""Refinements, one file each: they return another mask that removes as many weights from every row.

A file declares `REFINEMENT = Refinement(refine=..., statistic=...)`. Keyword-only arguments with a default are its
settings (`--set refinement.NAME=VALUE`).
"""
