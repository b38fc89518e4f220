"""Generation by PyTorch: transformers' models, eager or compiled, with dense, packed or CSR linears."""

import torch

from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.core.kernels.build import library
from neuronal_ray.models.checkpoint import load_model, open_checkpoint
from neuronal_ray.models.formats.packed_linear import pack_linears
from neuronal_ray.models.generation import Generation, sparsify_linears


def open_session(opening: Opening) -> Generation:
    """Load a model in the dtype of `opening`, or else its checkpoint's.

    Raises KernelUnavailable for packed linears where the kernel cannot run.
    """
    torch.set_num_threads(opening.threads)
    checkpoint = open_checkpoint(opening.path)
    dtype = checkpoint.config.get_text_config().dtype or torch.float32
    if opening.dtype is not None:
        dtype = getattr(torch, opening.dtype)
    model = load_model(checkpoint, device=torch.device(opening.device), dtype=dtype)
    if opening.runtime == "packed":
        library()
        pack_linears(model)
    if opening.runtime == "csr":
        sparsify_linears(model)
    return Generation(model, compiled=opening.runtime == "compiled", length=opening.length)
