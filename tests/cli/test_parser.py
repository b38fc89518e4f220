"""Do all commands refuse flags as our own errors are refused: one line, exit code 2, the flag and the nearest name?"""

import subprocess
import sys
from pathlib import Path

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.parser import Parser

COMMANDS = ("prune", "evaluate", "export", "sweep", "report", "benchmark")


def parser() -> Parser:
    made = Parser(prog="p")
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument("--count", type=int)
    made.add_argument("--rate", type=float)
    made.add_argument("--output", type=Path)
    made.add_argument("--shape")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"))
    made.add_argument("--option", action="append")
    made.add_argument("--resume", action="store_true")
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["f", "--count", "x"], "--count: 'x' is not an integer"),
        (["f", "--count", "9" * 30], "--count: '" + "9" * 30 + "' is beyond 64 bits"),
        (["f", "--rate", "nan"], "--rate: 'nan' is not a finite number"),
        (["f", "--output", ""], "--output: '' is blank, expected a name"),
        (["f", "--shape", "a\0"], "--shape: 'a\\x00' has a NUL"),
        (["f", "--device", "cpv"], "--device: 'cpv' is not one of: auto, cpu, cuda"),
        (["f", "--device", "cudda"], "--device: 'cudda' is not one of: auto, cpu, cuda (did you mean cuda?)"),
        (["f", "--device"], "--device: expected one argument (a value that begins with -- is written --device=VALUE)"),
        (["f", "--count", "-x"], "--count: '-x' is not an integer"),
        (["f", "--resume=yes"], "--resume: is a switch, which takes no value"),
        (["f", "--resum"], "--resum: unknown flag (did you mean --resume?)"),
        (["f", "-output", "o"], "-output: unknown flag (did you mean --output?)"),
        (["f", "--xyz"], "--xyz: unknown flag (see --help)"),
        (["--ouput", "o"], "--ouput: unknown flag (did you mean --output?)"),
        ([], "FILE: missing (see --help)"),
        (["f", "g"], "'g': unexpected argument; the value of a flag is one word (see --help)"),
        ([" "], "FILE: ' ' is blank, expected a name"),
    ],
    ids=str,
)
def test_what_argparse_refuses_is_bad_input(words: list[str], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        parser().parse_args(words)
    assert str(refused.value) == message


def test_negative_numbers_are_values() -> None:
    found = parser().parse_args(["f", "--count", "-3", "--rate", "-1e-3", "--shape", "-x"])
    assert (found.count, found.rate, found.shape) == (-3, -0.001, "-x")


def test_a_flag_given_twice_is_said_and_the_last_one_counts(caplog: pytest.LogCaptureFixture) -> None:
    words = ["f", "--count", "1", "--count=2", "--option", "a=1", "--option", "b=2", "--resume", "--resume"]
    assert parser().parse_args(words).count == 2
    assert caplog.messages == ["--count: given more than once, the last one counts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_flag_in_one_line(command: str) -> None:
    words = [sys.executable, "-m", "neuronal_ray", command, "--ouptut", "x"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"neuronal-ray {command}: error: --ouptut: unknown flag"), line
    assert "did you mean --output" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prun"], "neuronal-ray: error: 'prun': unknown command (did you mean prune?)"),
        ([], "neuronal-ray: error: COMMAND: missing"),
        (
            ["benchmark", "serch"],
            "neuronal-ray benchmark: error: unknown measurement 'serch', expected one of: search, ",
        ),
    ],
    ids=str,
)
def test_an_unknown_command_offers_the_nearest(words: list[str], expected: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "neuronal_ray", *words], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(expected), line
