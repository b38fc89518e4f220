"""The results of a run: the content of pruning.json, and the table for the terminal."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuronal_ray.cli.versions import versions
from neuronal_ray.core.problem import Allocation
from neuronal_ray.evaluate.scores import Score, windows_in_words
from neuronal_ray.models.hub import commit_of
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.inputs import Inputs
from neuronal_ray.prune.search import Search, noun_of
from neuronal_ray.report.pruning_json import mode_matters


def describe_result(
    config: PruneConfig,
    inputs: Inputs,
    allocation: Allocation,
    search: Search,
    results: Mapping[str, Mapping[str, Score]],
    *,
    zeros: int,
    input_zeros: int,
    without_weights: str,
    prunable: int,
    seconds: Mapping[str, float],
    devices: Sequence[str],
) -> dict[str, object]:
    """Return the content of pruning.json; `zeros` are counted in the saved tensors, `seconds` are by stage.

    `input_zeros` were zero before; `without_weights` names the blocks and linears that have no weight left.
    """
    return {
        "format": 1,
        "model": config.model,
        "revision": commit_of(inputs.checkpoint.path),
        "method": config.method,
        "allocation": inputs.composition.allocation,
        "row_step": inputs.composition.row_step,
        "refinement": config.refinement,
        "pattern": config.pattern,
        "mode": config.mode,
        "sparsity": {
            "target": inputs.composition.target,
            "achieved": zeros / prunable,
            "pruned": zeros,
            "prunable": prunable,
            "input": input_zeros / prunable,
            "input_zeros": input_zeros,
            "without_weights": without_weights,
        },
        "search": {
            step.name: {
                "noun": noun_of(step.name),
                "selected": step.selected,
                "candidates": [
                    {"lambda": lam, search.criterion(step.name): score if math.isfinite(score) else None}
                    for lam, score in zip(step.lambdas, step.scores, strict=True)
                ],
                "seconds": seconds[f"{step.name} search"],
            }
            for step in allocation.steps
        },
        "calibration": {
            "source": config.calibration,
            "samples": config.calibration_samples,
            "distinct": inputs.drawn.distinct,
            "packed": inputs.drawn.packed,
            "search_samples": config.search_samples,
            "sequence_length": inputs.sequence_length,
            "seed": config.seed,
            "window_start": inputs.window_start.of(config.calibration),
            "sha256": hashlib.sha256(inputs.calibration.numpy().tobytes()).hexdigest(),
        },
        "window_start": inputs.window_start.summary(),
        "evaluation": _evaluations(results),
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "versions": versions(config.method, inputs.composition.allocation, config.row_step or "", config.refinement),
        "devices": list(devices),
        "config": {key: _plain(value) for key, value in asdict(config).items()},
    }


def _evaluations(results: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, object]]:
    """Return the pruned model's score by text or benchmark; nested in it, those of the dense model and other plans."""
    names = list(results["dense"])
    return {
        name: results["pruned"][name].summary()
        | {plan: scores[name].value_summary() for plan, scores in results.items() if plan != "pruned"}
        for name in names
    }


def _plain(value: object) -> object:
    """`value` as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _what(summary: Mapping[str, Any]) -> str:
    """Return the method, the allocation and what else shaped the masks, in words."""
    parts = [summary["method"], summary["allocation"]]
    parts += [f"{summary['row_step']} rows"] if summary["row_step"] else []
    parts += [
        summary[key] for key, absent in (("refinement", "none"), ("pattern", "unstructured")) if summary[key] != absent
    ]
    return ", ".join(parts)


def results_table(summary: Mapping[str, Any], output: Path) -> str:
    """Return the results of a run as a table for the terminal."""
    sparsity, search = summary["sparsity"], summary["search"]
    mode = f" ({summary['mode']} mode)" if mode_matters(summary["mode"], searched=bool(search)) else ""
    lines = [
        "",
        f"{summary['model']} pruned to {sparsity['achieved']:.4%} "
        f"({sparsity['pruned']:,} of {sparsity['prunable']:,} weights) with {_what(summary)}{mode}",
        *([f"without any weight: {sparsity['without_weights']}"] if sparsity["without_weights"] else []),
        "",
    ]
    for name, measured in summary["evaluation"].items():
        perplexity = "perplexity" in measured
        metric = "perplexity" if perplexity else next(iter(measured))
        size = windows_in_words(measured) if perplexity else f"{measured['rows']} questions"
        lines.append(f"{metric} on {name} ({size})")
        others = [key for key, value in measured.items() if isinstance(value, dict) and key != "dense"]
        rows = [(key, measured[key][metric]) for key in ["dense", *others]]
        steps = f" ({' + '.join(search)})" if len(search) > 1 else ""
        extras = [summary[key] for key in ("row_step", "refinement") if summary[key] not in (None, "none")]
        rows.append((" + ".join([summary["allocation"] + steps, *extras]), measured[metric]))
        lines += [
            f"  {label:<24} {'overflow' if value is None else format(value, '12.3f'):>12}" for label, value in rows
        ]
    for step, found in search.items():
        tried = f"{len(found['candidates'])}{'' if found['noun'] == 'candidate' else ' candidates'}"
        lines.append(f"{step} step: {found['noun']} {found['selected']:g} of {tried}, {found['seconds']:.1f} s")
    lines.append(f"seconds in all: {sum(summary['seconds'].values()):.1f}")
    lines += [f"report: {output / 'report.html'}", f"model:  {output}"]
    return "\n".join(lines)
