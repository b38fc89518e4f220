"""Tables of measurements: any change of a file gives tables or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuronal_ray.benchmark.table import main
from neuronal_ray.cli.errors import BadInput

MACHINE = {
    "date": "2026-01-01", "processor": "x", "cores": 2, "threads": 1, "host_bytes": 2**34, "devices": ["GPU"],
    "versions": {"torch": "2"},
}  # fmt: skip
MODEL = {"name": "m", "blocks": 2, "dtype": "float32", "device_bytes": None}
SEARCH = MODEL | {
    "kind": "SearchMeasured", "stages": [{"name": "ranking", "seconds": 1.0}], "samples": 8, "length": 64,
    "search_s": 2.0, "forwards_alone_s": 1.0, "floor_s": 1.0, "staged_s": 2.0, "token_forwards": 512,
    "formula_bytes": 10, "host_bytes": 10, "literal": {"ratio": 2.0, "all_statistics": 3.0},
}  # fmt: skip
STAGES = dict.fromkeys(("loading", "statistics", "ranking", "checkpoint", "block search"), 1.0)
JOB = MODEL | {"kind": "JobMeasured", "stages": STAGES, "total_s": 5.0}
DOCUMENT = {"machine": MACHINE, "measured": [SEARCH, JOB]}


def test_searches_and_jobs_have_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DOCUMENT))
    main([str(tmp_path / "x.json")])
    printed = capsys.readouterr().out
    assert "| m, 2 blocks, float32 | 8 x 64 | 2.0 s | 1.0 s | 2.00 |" in printed
    assert "| m, 2 blocks, float32 | 5.0 s | 1.0 s | 1.0 s | 1.0 s | 1.0 s |" in printed


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """`value` with something in it replaced or removed."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 6)):
        changed = value.copy()
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.integers(0, 4)):
            changed[key] = draw(mutations(value[key]))
        else:
            del changed[key]
        return changed
    return draw(VALUES)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=mutations(DOCUMENT))
def test_any_change_of_a_file_gives_tables_or_one_line(document: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(document))
    message = ""
    try:
        main([str(file)])
    except BadInput as error:
        message = str(error)
    assert not message or (message.startswith(f"FILE: {file}") and "\n" not in message), message
