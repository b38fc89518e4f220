"""The speed of the kernels, compared with their references and with a copy of their bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from neuronal_ray.benchmark.device import measure_ceilings, seconds
from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import publish
from neuronal_ray.benchmark.shapes import device_of
from neuronal_ray.cli.parser import Parser
from neuronal_ray.core.kernels.freed_memory import keep_freed_memory
from neuronal_ray.core.kernels.gate import gated, gated_reference
from neuronal_ray.core.kernels.masking import zero_lowest, zero_lowest_reference
from neuronal_ray.core.kernels.norm import RmsNorm, rms_norm, rms_norm_reference
from neuronal_ray.core.kernels.ranking import rank, rank_reference
from neuronal_ray.core.kernels.rotary import rotary, rotary_reference
from neuronal_ray.core.kernels.squares import column_squares, squares_reference
from neuronal_ray.models.formats.semi_structured import has_sparse_units

_ROWS, _COLUMNS, _TOKENS = 4096, 4096, 2048
_HEAD = 128
_FORM = RmsNorm(eps=1e-6, rounded=True, plus_one=False)
_PRODUCTS = (1, 16, 256, 2048)
_ROUNDS, _IN_A_ROW = 7, 20


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Medians of seconds on one large input; `floor_s` is the time to read and write its bytes once, as a copy does."""

    name: str
    dtype: str
    kernel_s: float
    reference_s: float
    floor_s: float

    def line(self) -> str:
        """Return the kernel's row of the table."""
        return (
            f"  {self.name:<10} {self.dtype:<9} {self.kernel_s * 1e3:9.2f} ms   reference / kernel = "
            f"{self.reference_s / self.kernel_s:5.2f}   kernel / its bytes = {self.kernel_s / self.floor_s:.2f}"
        )


@dataclass(frozen=True, kw_only=True)
class KernelsMeasured:
    """All kernels, in float32 and bfloat16."""

    device: str
    kernels: tuple[Kernel, ...]

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        shapes = f"weights {_ROWS} x {_COLUMNS}, inputs {_TOKENS} x {_COLUMNS}"
        return [f"kernels ({self.device}): {shapes}, medians of {_ROUNDS}", *(kernel.line() for kernel in self.kernels)]


def main(argv: Sequence[str]) -> None:
    """Measure every kernel."""
    parser = Parser(
        prog="neuronal-ray benchmark kernels",
        description="Time masking, ranking and column squares, on a GPU also normalization, rotary embedding and "
        "gate, and their definitions in torch.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_figures(arguments)
    measured = measure_kernels(torch.device(device_of(arguments.device)))
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def _repeated(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _two_four(
    weight: Float[Tensor, "rows columns"], inputs: Float[Tensor, "tokens columns"]
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
    """Yield products with a 2:4 weight, in torch's semi-structured form and dense, for several numbers of tokens."""
    groups = weight.unflatten(1, (-1, 4))
    pruned = (groups * (groups.abs().argsort(dim=2).argsort(dim=2) >= 2)).flatten(1)
    sparse = to_sparse_semi_structured(pruned)
    for tokens in _PRODUCTS:
        some = inputs[:tokens].contiguous()
        moved = (weight.numel() * 9 // 16 + tokens * sum(weight.shape)) * weight.itemsize
        yield f"2:4 x {tokens}", partial(F.linear, some, sparse), partial(F.linear, some, pruned), moved


def measure_kernels(
    device: torch.device, *, rows: int = _ROWS, columns: int = _COLUMNS, tokens: int = _TOKENS
) -> KernelsMeasured:
    """Time each kernel and its reference; on a CPU freed memory is kept for both, as in a worker."""
    if device.type == "cpu":
        keep_freed_memory()
    in_a_row = (
        _IN_A_ROW if device.type == "cuda" else 1
    )  # so that the start of a kernel is hidden behind the one before
    source = torch.Generator().manual_seed(0)
    score = torch.rand(rows, columns, generator=source)
    ranks, removed = rank(score).to(device), torch.full((rows,), columns * 7 // 10, dtype=torch.int32, device=device)
    score, kernels = score.to(device), []
    for dtype in (torch.float32, torch.bfloat16):
        bandwidth = measure_ceilings(device, dtype).bandwidth
        weight = torch.randn(rows, columns, generator=source).to(device, dtype)
        inputs = torch.randn(1, tokens, columns, generator=source).to(device, dtype)
        out, item = torch.empty_like(weight), dtype.itemsize
        cases: list[tuple[str, Callable[[], object], Callable[[], object], int]] = [
            (
                "cut",
                partial(zero_lowest, weight, ranks, removed, out=out),
                partial(zero_lowest_reference, weight, ranks, removed),
                weight.numel() * (2 * item + ranks.itemsize),
            ),
            ("squares", partial(column_squares, inputs), partial(squares_reference, inputs), inputs.numel() * item),
        ]
        if dtype == torch.float32:  # that of scores
            moved = score.numel() * (item + ranks.itemsize)
            cases.append(("rank", partial(rank, score), partial(rank_reference, score), moved))
        if device.type == "cuda":  # a CPU leaves these to torch
            factor, others, moved = weight[0].contiguous(), inputs.flip(1), 2 * inputs.numel() * item
            heads = inputs.view(1, tokens, -1, _HEAD).transpose(1, 2)
            angles = (inputs[:, :, :_HEAD].contiguous(), inputs[:, :, _HEAD : 2 * _HEAD].contiguous())
            cases += [
                (
                    "norm",
                    partial(rms_norm, inputs, factor, _FORM),
                    partial(rms_norm_reference, inputs, factor, _FORM),
                    moved,
                ),
                ("rotary", partial(rotary, heads, *angles), partial(rotary_reference, heads, *angles), moved),
                ("gate", partial(gated, inputs, others), partial(gated_reference, inputs, others), moved * 3 // 2),
            ]
            if dtype == torch.bfloat16 and has_sparse_units(device):
                cases += _two_four(weight, inputs[0])
        for name, kernel, reference, moved in cases:
            spent: dict[str, list[float]] = {"kernel": [], "reference": []}
            for _ in range(_ROUNDS + 1):  # the first warms up
                for which, call in (("kernel", kernel), ("reference", reference)):
                    spent[which].append(seconds(device, partial(_repeated, call, in_a_row)) / in_a_row)
            kernels.append(
                Kernel(
                    name=name,
                    dtype=str(dtype).removeprefix("torch."),
                    kernel_s=median(spent["kernel"][1:]),
                    reference_s=median(spent["reference"][1:]),
                    floor_s=moved / bandwidth,
                )
            )
    return KernelsMeasured(device=str(device), kernels=tuple(kernels))
