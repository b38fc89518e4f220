"""Do the small runs of digests.py compute what they always computed?"""

from pathlib import Path

import digests
import pytest


def test_every_run_computes_what_is_recorded(tmp_path: Path) -> None:
    expected = digests.recorded().get(digests.processor())
    if expected is None:
        pytest.skip(f"nothing is recorded for {digests.processor()}: see tests/digests.py --record")
    found = digests.compute(tmp_path)
    assert found == expected


def test_a_digest_sees_the_last_bit() -> None:
    assert digests.digest_of(0.1 + 0.2) != digests.digest_of(0.3)
