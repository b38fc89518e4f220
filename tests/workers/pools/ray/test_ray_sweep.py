"""A sweep on Ray, with two workers, has the results of a sweep in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import neuronal_ray.sweep.__main__
from neuronal_ray.report.inputs import read_results

VARIANTS = {
    "Uniform": 'allocation = "uniform"',
    "NeuronAL": 'allocation = "neuronal"',
    "SparseGPT": 'allocation = "uniform"\nmethod = "sparsegpt"',
}


def sweep_file(folder: Path) -> Path:
    rows = [{"sentence1": f"the cat {n}", "sentence2": "it sat", "label": n % 2, "idx": n} for n in range(10)]
    (folder / "rte_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        "[options]",
        f'model = "{folder / "model"}"',
        f'calibration = "{folder / "calibration.txt"}"',
        f'evaluate = ["{folder / "evaluation.txt"}", "{folder / "other.txt"}", "rte"]',
        f'task-data = "{folder}"',
        "calibration-samples = 6",
        "search-samples = 2",
        f"sequence-length = {tiny.LENGTH}",
        "block-lambdas = [0.05, 0.15]",
        "row-lambdas = [0.0, 0.1]",
        "threads = 1",
        'mode = "paper"',
        "[grid]",
        "sparsity = [0.5, 0.7]",
    ]
    for name, options in VARIANTS.items():
        lines += ["[[variant]]", f'name = "{name}"', options]
    path = folder / "sweep.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("one_thread")
def test_two_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_texts(tmp_path)
    file = sweep_file(tmp_path)
    # a process of its own: Ray remembers the token of the first cluster that a process has seen
    command = [sys.executable, "-m", "neuronal_ray.sweep", str(file), "--output", str(tmp_path / "two")]
    finished = subprocess.run(
        [*command, "--address", "local", "--replicas", "2"], capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert neuronal_ray.sweep.__main__.main([str(file), "--output", str(tmp_path / "one"), "--address", "none"]) == 0
    found = {
        name: {(r.cell, r.evaluation): (r.value, r.error, r.rows) for r in read_results([tmp_path / name])}
        for name in ("one", "two")
    }
    assert len(found["one"]) == (len(VARIANTS) * 2 + 1) * 3
    assert found["one"] == found["two"]
