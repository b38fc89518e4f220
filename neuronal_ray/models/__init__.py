"""The only package that imports transformers: blocks and their wiring, checkpoints, output files and formats."""
