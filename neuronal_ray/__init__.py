"""neuronal_ray: prune large language models to 60-80 % unstructured sparsity without re-training."""

__version__ = "0.1.0"
