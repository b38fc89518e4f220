"""Formats of a pruned model for export and inference, and the audit of a dense directory."""
