"""Formats that a pruned model is exported to."""
