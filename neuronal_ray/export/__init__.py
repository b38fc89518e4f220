"""Checking pruned models, and writing them in other forms."""
