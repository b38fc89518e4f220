"""Is a sparse model called faster only where the rounds leave no doubt?"""

import pytest

from neuronal_ray.benchmark.runtimes.measured import Pair, Side, gain, header, spread


def side(decode: list[float]) -> Side:
    return Side(
        disk_bytes=2**30,
        load_s=1.0,
        peak_bytes=2**31,
        held_bytes=2**30,
        prefill={1: [100.0, 100.0, 100.0]},
        decode={1: decode},
    )


def test_equal_rates_are_no_gain() -> None:
    found = gain([10.0, 10.1, 9.9], [10.0, 10.0, 10.0])
    assert not found.real, found


def test_a_difference_within_the_spread_is_no_gain() -> None:
    found = gain([10.0, 12.0, 9.0, 13.0, 11.0], [10.0] * 5)
    assert found.ratio == pytest.approx(1.1)
    assert found.threshold == pytest.approx(1 + 0.2 / 1.1)
    assert not found.real


def test_a_difference_beyond_the_spread_is_one() -> None:
    found = gain([20.0, 20.2, 19.8], [10.0, 10.0, 10.0])
    assert found.ratio == pytest.approx(2.0)
    assert found.real


def test_rounds_are_compared_with_their_neighbors_so_that_a_machine_that_slows_down_does_not_matter() -> None:
    found = gain([20.0, 10.0, 5.0], [10.0, 5.0, 2.5])
    assert (found.ratio, found.threshold) == (2.0, 1.05)


def test_a_gain_in_the_ratios_that_the_medians_do_not_show_is_none() -> None:
    found = gain([8.0, 9.0, 20.0, 9.0, 20.0], [4.0, 12.0, 10.0, 12.0, 10.0])
    assert found.ratio == pytest.approx(0.9), found
    assert not found.real


def test_the_table_says_no_gain_and_by_which_threshold() -> None:
    slower = Pair(runtime="eager", dense=side([10.0, 10.0, 10.0]), sparse=side([9.0, 9.1, 9.2])).lines()
    faster = Pair(runtime="packed", dense=side([10.0, 10.0, 10.0]), sparse=side([19.0, 20.0, 21.0])).lines()
    assert slower[2].split() == ["sparse", "/", "dense", "no", "gain", "no", "gain"], slower
    assert faster[2].split() == ["sparse", "/", "dense", "no", "gain", "2.00"], faster
    assert faster[3].split() == ["gain", "if", "above", "1.05", "1.05"], faster
    assert len(header([1])) == len(slower[0]) == len(slower[3])


def test_the_spread_is_between_the_quartiles() -> None:
    assert spread([7.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
