"""One pruning run."""
