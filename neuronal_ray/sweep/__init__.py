"""Many pruning runs from one file."""
