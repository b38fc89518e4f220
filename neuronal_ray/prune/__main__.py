"""`python -m neuronal_ray.prune`: prune a model, evaluate it and write it."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import InternalError, Unfinished, exit_code
from neuronal_ray.cli.options import parse_config
from neuronal_ray.prune.config import PruneConfig

_DESCRIPTION = """Prune the linear weights of a language model to an unstructured sparsity, without re-training.
By default: Wanda's scores, with sparsity spread over blocks, sub-blocks and rows by output divergence (--mode best).
Example:
neuronal-ray prune --model huggyllama/llama-7b --output pruned --sparsity 0.7 --evaluate wikitext2,c4,ptb"""
_KEPT = "what is finished was kept: the same command with --resume goes on from there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray prune", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(PruneConfig, argv, prog="neuronal-ray prune", description=_DESCRIPTION)
    if config.output is None and not config.dry_run:
        raise BadInput("--output: missing, expected the directory to write")
    # The imports below load torch and transformers: only once the options are known to be good.
    from neuronal_ray.cli.atomic import check_output, staged
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.models.tensor_files import check_room
    from neuronal_ray.prune.dry_run import describe_run
    from neuronal_ray.prune.inputs import Reader, held_tokens
    from neuronal_ray.prune.journal import journaled
    from neuronal_ray.prune.pipeline import run
    from neuronal_ray.report.run_page import write_report
    from neuronal_ray.workers.pools.launch import check_device, open_pool

    if config.output is not None:
        check_output(config.output, overwrite=config.overwrite)
    check_device(config)
    inputs = Reader().prepare(config)
    if config.output is not None:
        check_room(config.output, inputs.checkpoint.num_bytes, flag="--output")
    if config.output is None or config.dry_run:
        print(describe_run(config, inputs))
        return
    try:
        with (
            staged(config.output) as staging,
            journaled(config.output, resume=config.resume) as journal,
            ExitStack() as stack,
        ):
            progress = Progress(staging / "events.jsonl")
            with progress.stage("loading", 1) as advance:
                pool = stack.enter_context(
                    open_pool(
                        config,
                        inputs.checkpoint,
                        pruner=inputs.composition.pruner,
                        held=held_tokens(config, inputs),
                    )
                )
                shards = f" x {pool.shards} shards" if pool.shards > 1 else ""
                advance(f"{pool.replicas} replica{'s' * (pool.replicas > 1)}{shards}")
            summary = run(config, inputs, pool, staging, progress, journal=journal)
            write_report(staging)
    except BadInput:
        raise
    except (Unfinished, OSError) as error:  # a full disk, say, or workers that are gone
        raise Unfinished(f"{error}\n{_KEPT}") from error
    except Exception as error:
        raise InternalError(_KEPT) from error
    print(_table(summary, config.output))


def _what(summary: Mapping[str, Any]) -> str:
    """Return the method, the allocation and what else shaped the masks, in words."""
    parts = [summary["method"], summary["allocation"]]
    parts += [f"{summary['row_step']} rows"] if summary["row_step"] else []
    parts += [
        summary[key] for key, absent in (("refinement", "none"), ("pattern", "unstructured")) if summary[key] != absent
    ]
    return ", ".join(parts)


def _table(summary: Mapping[str, Any], output: Path) -> str:
    """Return the results of a run as a table for the terminal."""
    sparsity, search = summary["sparsity"], summary["search"]
    lines = [
        "",
        f"{summary['model']} pruned to {sparsity['achieved']:.4%} "
        f"({sparsity['pruned']:,} of {sparsity['prunable']:,} weights) with {_what(summary)} ({summary['mode']} mode)",
        "",
    ]
    for name, measured in summary["evaluation"].items():
        perplexity = "perplexity" in measured
        metric = "perplexity" if perplexity else next(iter(measured))
        size = (
            f"{measured['windows']} windows of {measured['sequence_length']} tokens"
            if perplexity
            else (f"{measured['rows']} questions")
        )
        lines.append(f"{metric} on {name} ({size})")
        names = {"block": "NeuronAL, block step", "neuronal": "NeuronAL, block + row"}
        baselines = [key for key, value in measured.items() if isinstance(value, dict) and key != "dense"]
        rows = [(names.get(key, key), measured[key][metric]) for key in ["dense", *baselines]]
        label = {"neuronal": "NeuronAL, " + " + ".join(search)}.get(summary["allocation"], summary["allocation"])
        extras = [summary[key] for key in ("row_step", "refinement") if summary[key] not in (None, "none")]
        rows.append((" + ".join([label, *extras]), measured[metric]))
        lines += [
            f"  {label:<24} {'overflow' if value is None else format(value, '12.3f'):>12}" for label, value in rows
        ]
    for step, found in search.items():
        lines.append(
            f"{step} step: {'lambda' if step in ('block', 'row') else 'number'} {found['selected']:g} of "
            f"{len(found['candidates'])} candidates, "
            f"{found['seconds']:.1f} s"
        )
    lines.append(f"seconds in all: {sum(summary['seconds'].values()):.1f}")
    lines += [f"report: {output / 'report.html'}", f"model:  {output}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
