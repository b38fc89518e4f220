"""Is what a command says about bad input a line that a terminal can show?"""

import pytest

from neuronal_ray.cli.exit_codes import one_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--x: a\n  b\tc", "--x: a b c"),
        ("--x: \x1b[31mred", "--x: \\x1b[31mred"),
        ("--x: \ud800 and \x00", "--x: \\ud800 and \\x00"),
        ("--x: caf\xe9", "--x: caf\xe9"),
    ],
)
def test_control_characters_are_escaped(message: str, expected: str) -> None:
    assert one_line(message) == expected


def test_the_middle_of_a_long_message_is_cut() -> None:
    line = one_line(f"--x: {'y' * 10_000}, expected less")
    assert len(line) < 1100, len(line)
    assert line.startswith("--x: y")
    assert line.endswith("y, expected less")
