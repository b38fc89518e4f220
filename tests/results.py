"""One row of a sweep's results, made up, for the tests of reports."""

from neuronal_ray.report.schemas import Result


def row(**changes: object) -> Result:
    """A cell of Wanda at 70 % on one text; `changes` by field."""
    values: dict[str, object] = {
        "cell": "0" * 12, "variant": "Uniform", "model": "some/model", "method": "wanda", "allocation": "uniform",
        "row_step": None, "refinement": "none", "pattern": "unstructured", "mode": "paper", "criterion": "alignment",
        "sparsity": 0.7, "achieved": 0.7, "seed": 0, "calibration": "c4", "calibration_samples": 8,
        "search_samples": 4, "sequence_length": 64, "block_lambda": None, "row_lambda": None, "evaluation": "wikitext2",
        "metric": "perplexity", "value": 50.0, "error": None, "rows": 10, "dense": 10.0, "seconds": 2.0,
        "search_seconds": 1.0, "evaluation_seconds": 0.5, "peak_bytes": 2**30, "device": "cpu, 1 threads",
        "problem": None, "config": "{}", "versions": '{"torch": "2"}',
    }  # fmt: skip
    return Result(**(values | changes))  # type: ignore[arg-type]
