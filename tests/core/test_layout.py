"""A layout lists its blocks and groups, and maps a consumer's signal to rows."""

import torch

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec


def spec(block: int, path: str, *, index: int, sources: torch.Tensor | None = None) -> LinearSpec:
    return LinearSpec(
        linear=Linear(block, path),
        rows=2 if sources is None else len(sources),
        columns=3,
        reads=Group(block, index),
        consumer=None,
        sources=sources,
    )


LAYOUT = Layout(
    (spec(0, "q", index=0), spec(0, "k", index=0), spec(0, "o", index=1), spec(1, "q", index=0), spec(1, "o", index=1))
)


def test_blocks_and_groups_hold_their_linears_in_order() -> None:
    assert LAYOUT.num_blocks == 2
    assert LAYOUT.prunable == 5 * 6
    assert [[linear.linear.path for linear in block] for block in LAYOUT.blocks] == [["q", "k", "o"], ["q", "o"]]
    assert {group: [linear.linear.path for linear in linears] for group, linears in LAYOUT.groups.items()} == {
        Group(0, 0): ["q", "k"],
        Group(0, 1): ["o"],
        Group(1, 0): ["q"],
        Group(1, 1): ["o"],
    }
    assert LAYOUT[Linear(1, "o")] is LAYOUT.blocks[1][1]


def test_the_first_reader_of_a_group_is_the_first_in_order() -> None:
    readers = LAYOUT.first_readers(0)
    assert {group: linear.linear.path for group, linear in readers.items()} == {Group(0, 0): "q", Group(0, 1): "o"}


def test_a_signal_is_read_row_by_row_or_averaged_over_the_sources() -> None:
    signal = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert spec(0, "q", index=0).row_signal(signal).tolist() == [1.0, 2.0, 4.0, 8.0]
    sources = torch.tensor([[0, 2], [1, 3], [3, 3]])
    assert spec(0, "k", index=0, sources=sources).row_signal(signal).tolist() == [2.5, 5.0, 8.0]
