"""`python -m neuronal_ray.prune`: prune a model, evaluate it and write it."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import InternalError, Unfinished, exit_code
from neuronal_ray.cli.options import parse_config
from neuronal_ray.prune.config import PruneConfig

_DESCRIPTION = """Prune the linear weights of a language model to an unstructured sparsity, without re-training.
By default: Wanda's scores, with sparsity spread over blocks, sub-blocks and rows by output divergence (--mode best).
Example:
neuronal-ray prune --model huggyllama/llama-7b --output pruned --sparsity 0.7 --evaluate wikitext2,c4,ptb"""
_KEPT = "what is finished was kept: the same command with --resume goes on from there"
_NOTHING_KEPT = "nothing was finished yet, so there is nothing to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray prune", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(PruneConfig, argv, prog="neuronal-ray prune", description=_DESCRIPTION)
    if config.output is None and not config.dry_run:
        raise BadInput("--output: missing, expected the directory to write")
    # The imports below load torch and transformers: only once the options are known to be good.
    from neuronal_ray.cli.atomic import check_apart, check_output, staged
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.cli.versions import code_version
    from neuronal_ray.models.tensor_files import check_room
    from neuronal_ray.prune.dry_run import describe_run
    from neuronal_ray.prune.inputs import Reader, held_tokens
    from neuronal_ray.prune.journal import journal_folder, journaled
    from neuronal_ray.prune.pipeline import run
    from neuronal_ray.prune.summary import results_table
    from neuronal_ray.report.run_page import write_report
    from neuronal_ray.workers.pools.launch import check_device, open_pool

    if config.output is not None:
        texts = [name for name in (config.calibration, *config.evaluate, config.task_data) if name is not None]
        check_output(config.output, kind="directory", overwrite=config.overwrite, models=[config.model], inputs=texts)
    check_device(config)
    inputs = Reader().prepare(config)
    if config.output is not None:
        check_apart(config.output, models=[inputs.checkpoint.path])  # known by now, also for a name on the hub
        check_room(config.output, inputs.checkpoint.num_bytes, flag="--output")
    if config.output is None or config.dry_run:
        print(describe_run(config, inputs))
        return
    version = code_version(config.method, config.refinement)
    try:
        with (
            staged(config.output, overwrite=config.overwrite) as staging,
            journaled(config.output, resume=config.resume, version=version) as journal,
            ExitStack() as stack,
        ):
            progress = Progress(staging / "events.jsonl")
            with progress.stage("loading", 1) as advance:
                pool = stack.enter_context(
                    open_pool(
                        config, inputs.checkpoint, pruner=inputs.composition.pruner, held=held_tokens(config, inputs)
                    )
                )
                shards = f" x {pool.shards} shards" if pool.shards > 1 else ""
                advance(f"{pool.replicas} replica{'s' * (pool.replicas > 1)}{shards}")
            summary = run(config, inputs, pool, staging, progress, journal=journal)
            write_report(staging)
    except BadInput:
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_KEPT if journal_folder(config.output).exists() else _NOTHING_KEPT) from error
    except Exception as error:
        outcome = _KEPT if journal_folder(config.output).exists() else _NOTHING_KEPT
        if isinstance(error, Unfinished | OSError):  # a full disk, for example, or workers that are gone
            raise Unfinished(f"{error}\n{outcome}") from error
        raise InternalError(outcome) from error
    print(results_table(summary, config.output))


if __name__ == "__main__":
    sys.exit(main())
