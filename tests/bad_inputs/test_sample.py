"""Are bad inputs refused in one line that names the flag or file, with nothing left behind and nothing touched?

A sample; `make soak` tries all of them.
"""

from pathlib import Path

import pytest
from bad_inputs.all_cases import all_cases, sample
from bad_inputs.case import Case
from bad_inputs.good import COMMANDS, warm_up, write_good
from bad_inputs.harness import run_case

pytestmark = pytest.mark.usefixtures("one_thread")

READERS = {
    "command line",
    "benchmark",
    "--config",
    "pruning.json",
    "search.parquet",
    "allocation.parquet",
    "sweep.json",
}
READERS |= {"results/*.parquet", "journal.jsonl", "search.json"}
SIZE, SEED = 150, 20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_inputs") / "good"
    write_good(folder)
    warm_up(folder)
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if command])
def test_what_is_undamaged_works(command: str, good: Path, tmp_path: Path) -> None:
    control = Case(reader="none", what="undamaged", command=command, named=(), damage=lambda _: [], harmless=True)
    outcome = run_case(control, good=good, work=tmp_path / "work")
    assert not outcome.fault, outcome


@pytest.mark.parametrize(
    "case",
    sample([case for case in all_cases() if case.reader in READERS], SIZE, seed=SEED),
    ids=lambda case: case.name,
)
def test_a_bad_input(case: Case, good: Path, tmp_path: Path) -> None:
    outcome = run_case(case, good=good, work=tmp_path / "work")
    assert not outcome.fault, outcome
