"""Runs the Triton kernel on the CPU, in Triton's interpreter, against its reference; needs TRITON_INTERPRET=1."""

import torch

from neuronal_ray.kernels.cut import cut_reference
from neuronal_ray.kernels.triton_cut import triton_cut


def main() -> None:
    source = torch.Generator().manual_seed(0)
    cases = 0
    for rows, columns in ((1, 1), (5, 33), (9, 1025)):
        for dtype in (torch.float32, torch.float16):
            for transposed in (False, True):
                weight = torch.randn(rows, columns, generator=source).to(dtype)
                ranks = torch.rand(rows, columns, generator=source).argsort(dim=1).to(torch.int16)
                removed = torch.randint(0, columns + 1, (rows,), generator=source, dtype=torch.int32)
                stored = weight.t().contiguous().t() if transposed else weight
                out = torch.full_like(stored, torch.nan)
                triton_cut(stored, ranks, removed, out)
                assert torch.equal(out, cut_reference(weight, ranks, removed)), (rows, columns, dtype, transposed)
                cases += 1
    print(f"{cases} cases equal")


if __name__ == "__main__":
    main()
