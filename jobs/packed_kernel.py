"""Speed of the packed product, compared with torch's dense product and with the ratio of bytes.

    python jobs/packed_kernel.py --threads 2

The matrices have real shapes, and there are so many that no cache holds them; dense and packed products alternate.
Prints the bandwidth of reading and of copying, and for each dtype, shape, sparsity and number of vectors the median
milliseconds of a product by torch's dense linear and by the packed kernel, their ratio, and the ratio of bytes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from neuronal_ray.core.kernels.packed_rows import multiply, pack_rows

SHAPES = ((4096, 4096), (11008, 4096))
RATES = (0.6, 0.7, 0.8)
VECTORS = (1, 4, 8)
AT_LEAST = 300 * 2**20
"""Bytes of the dense matrices together."""


def main() -> int:
    """Return exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--dtypes", default="bfloat16,float32", metavar="NAMES")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = torch.ones(AT_LEAST // 4)
    target = torch.empty_like(source)
    read_s, copy_s = _seconds([[source.sum], [lambda: target.copy_(source)]], arguments.rounds)
    print(f"{arguments.threads} threads: reading {source.nbytes / read_s / 1e9:.1f} GB/s, ", end="")
    print(f"copying {2 * source.nbytes / copy_s / 1e9:.1f} GB/s read and written")
    print("| dtype | matrix | zeros | vectors | dense | packed | dense / packed | bytes dense / packed |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.dtypes.split(","):
        for shape in SHAPES:
            for rate in RATES:
                _measure(name, getattr(torch, name), shape, rate, arguments.rounds)
    return 0


def _measure(name: str, dtype: torch.dtype, shape: tuple[int, int], rate: float, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    count = -(-AT_LEAST // (shape[0] * shape[1] * dtype.itemsize))
    dense = []
    for _ in range(count):
        kept = torch.rand(shape, generator=generator) >= rate
        dense.append((torch.randn(shape, generator=generator) * kept).to(dtype))
    packed = [pack_rows(weight) for weight in dense]
    for vectors in VECTORS:
        inputs = torch.randn(vectors, shape[1], generator=generator).to(dtype)
        dense_s, packed_s = _seconds(
            [
                [lambda weight=weight, inputs=inputs: torch.nn.functional.linear(inputs, weight) for weight in dense],
                [lambda weight=weight, inputs=inputs: multiply(weight, inputs) for weight in packed],
            ],
            rounds,
        )
        size = f"{shape[0]} x {shape[1]}"
        print(
            f"| {name} | {size} | {rate:.0%} | {vectors} | {dense_s * 1e3:.3f} ms | {packed_s * 1e3:.3f} ms "
            f"| {dense_s / packed_s:.2f} | {dense[0].nbytes / packed[0].nbytes:.2f} |",
            flush=True,
        )


def _seconds(groups: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """Return the median seconds of a call of each group; groups alternate, and the first round does not count."""
    found: list[list[float]] = [[] for _ in groups]
    for _ in range(rounds + 1):
        for calls, seconds in zip(groups, found, strict=True):
            begin = time.perf_counter()
            for call in calls:
                call()
            seconds.append((time.perf_counter() - begin) / len(calls))
    return [median(seconds[1:]) for seconds in found]


if __name__ == "__main__":
    sys.exit(main())
