"""Measuring a model: perplexity of texts, accuracy on benchmarks."""
