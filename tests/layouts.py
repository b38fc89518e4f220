"""Layouts of given shapes, and water-filling by bisection, for the tests of plans."""

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec

Shapes = list[list[tuple[int, int]]]
"""[rows, columns] of the linears of each block."""


def layout_of(blocks: Shapes) -> Layout:
    """Return linears of these shapes, each in a group of its own and without a consumer."""
    return Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, f"linear{index}"),
                rows=rows,
                columns=columns,
                reads=Group(block, index),
                consumer=None,
                sources=None,
            )
            for block, shapes in enumerate(blocks)
            for index, (rows, columns) in enumerate(shapes)
        )
    )


def water_filled(rates: list[float], sizes: list[float], total: float) -> list[float]:
    """Move the rates by one offset, found by bisection, and bound them, so that they remove `total` weights."""

    def moved(offset: float) -> list[float]:
        return [min(1.0, max(0.0, rate + offset)) for rate in rates]

    low, high = -max(rates), 1 - min(rates)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(rate * size for rate, size in zip(moved(middle), sizes, strict=True)) > total:
            high = middle
        else:
            low = middle
    return moved(low)
