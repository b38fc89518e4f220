"""Loading a 2:4 model with its linears in torch's semi-structured form, for a GPU's sparse matrix units."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.blocks import find_blocks, find_linears
from neuronal_ray.models.checkpoint import load_model, open_checkpoint

_KEPT, _GROUP = 2, 4
_NAME = "load_semi_structured"


def has_sparse_units(device: torch.device) -> bool:
    """Return whether a CUDA device has units for 2:4 matrices, as all from Ampere on have."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def is_two_four(weight: Float[Tensor, "rows columns"]) -> bool:
    """Return whether at most 2 of every 4 aligned inputs of a row are not zero."""
    rows, columns = weight.shape
    if columns % _GROUP:
        return False
    kept = (weight != 0).view(rows, columns // _GROUP, _GROUP).sum(dim=2)
    return bool((kept <= _KEPT).all())


def two_four_linears(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """Yield the linears of the blocks. Raises UnsupportedModel at the first that is no nn.Linear with a 2:4 pattern."""
    for index, block in enumerate(find_blocks(model)[1]):
        for path, module in find_linears(block).items():
            if not isinstance(module, nn.Linear):
                raise UnsupportedModel(f"{_NAME}: block {index} {path} is a {type(module).__name__}, not an nn.Linear")
            if not is_two_four(module.weight.data):
                raise UnsupportedModel(
                    f"{_NAME}: block {index} {path} is not 2:4 (2 of every 4 inputs stay); prune with --pattern 2:4"
                )
            yield module


def load_semi_structured(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a dense 2:4 directory on `device`, the weights of its blocks' linears in torch's semi-structured form.

    `dtype`: float16 or bfloat16. Raises BadInput for a device without sparse matrix units, UnsupportedModel for a model
    with a linear that is not 2:4 and for shapes that torch's kernels do not support.
    """
    target = torch.device(device)
    if dtype not in (torch.float16, torch.bfloat16):
        raise BadInput(f"{_NAME}: {dtype} has no sparse products, expected torch.float16 or torch.bfloat16")
    if target.type != "cuda" or not torch.cuda.is_available():
        raise BadInput(f"{_NAME}: {target} has no sparse matrix units, expected a CUDA device")
    if not has_sparse_units(target):
        raise BadInput(f"{_NAME}: {torch.cuda.get_device_name(target)} has no sparse matrix units (before Ampere)")
    checkpoint = open_checkpoint(Path(path), trust_remote_code=trust_remote_code)
    host = torch.device("cpu")
    model = load_model(checkpoint, device=host, dtype=dtype, trust_remote_code=trust_remote_code)
    linears = list(two_four_linears(model))
    model.to(target)
    for linear in linears:
        try:
            sparse = to_sparse_semi_structured(linear.weight.data)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModel(f"{_NAME}: {tuple(linear.weight.shape)} weights: {error}") from error
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    return model
