"""`python -m neuronal_ray.evaluate`: measure perplexity and benchmarks of a model, dense or pruned."""

import sys
from collections.abc import Sequence

from neuronal_ray.cli.exit_codes import exit_code
from neuronal_ray.cli.options import parse_config
from neuronal_ray.evaluate.config import EvaluateConfig

_DESCRIPTION = """Measure a model's perplexity by the protocol of the pruning papers (consecutive windows, losses in
float32) and its accuracy on the benchmarks of lm-eval. Example:
neuronal-ray evaluate --model pruned --evaluate wikitext2,c4,ptb,zero-shot"""
_FORMAT = "neuronal_ray evaluation"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray evaluate", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(EvaluateConfig, argv, prog="neuronal-ray evaluate", description=_DESCRIPTION)
    # The imports below load torch and transformers: only once the options are known to be good.
    from neuronal_ray.cli.atomic import check_apart, check_output, has_format, write_json
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.cli.versions import versions
    from neuronal_ray.data.text import warn_of_unused_columns
    from neuronal_ray.data.window_start import AUTO
    from neuronal_ray.evaluate.benchmark_names import MEAN, ZERO_SHOT, split_names
    from neuronal_ray.evaluate.inputs import read_evaluations, sequence_length
    from neuronal_ray.evaluate.measure import measure
    from neuronal_ray.evaluate.scores import windows_in_words
    from neuronal_ray.evaluate.window_start import possible_start, read_both, recorded_start, warn_of_tokenized
    from neuronal_ray.models.checkpoint import open_checkpoint
    from neuronal_ray.models.hub import commit_of, resolve_model
    from neuronal_ray.workers.pools.launch import check_device, check_workers, open_pool

    if config.output is not None:
        check_output(
            config.output,
            kind="file",
            overwrite=config.overwrite,
            earlier=lambda path: has_format(path, _FORMAT),
            models=[config.model],
            inputs=[*config.evaluate, *([] if config.task_data is None else [config.task_data])],
        )
    check_device(config)
    checkpoint = open_checkpoint(
        resolve_model(config.model, config.revision), trust_remote_code=config.trust_remote_code
    )
    if config.output is not None:
        check_apart(config.output, models=[checkpoint.path])  # known by now, also for a name on the hub
    check_workers(config, checkpoint)
    length = sequence_length(config, checkpoint)
    texts, _ = split_names(config.evaluate)
    if config.window_start is not None:
        warn_of_tokenized(texts)
    warn_of_unused_columns(texts, config.text_column)
    start = possible_start(
        config.window_start or recorded_start(checkpoint.path) or AUTO,
        texts,
        checkpoint.path,
        length=length,
        trust_remote_code=config.trust_remote_code,
    )
    evaluations = read_evaluations(config, config.evaluate, checkpoint, length=length, start=start)
    progress = Progress()
    with open_pool(config, checkpoint) as pool:
        if evaluations.undecided is not None:
            start = start.decided(read_both(pool, evaluations.undecided.tokens, start, progress))
            evaluations = read_evaluations(config, config.evaluate, checkpoint, length=length, start=start)
        scores = measure(pool, evaluations, None, progress, label="as it is")
    if start.readings is not None:
        print(f"window start: {start}")
    for name in evaluations.windows:
        print(f"{name}: perplexity {scores[name].value} ({windows_in_words(scores[name].summary())})")
    for name in evaluations.benchmarks:
        score = scores[name]
        print(f"{name}: {score.metric} {score.value:.4f} +- {score.error:.4f} ({score.rows} questions)")
    if MEAN in scores:
        mean = scores[MEAN]
        print(f"mean of the {len(ZERO_SHOT)} zero-shot tasks: accuracy {mean.value:.4f} +- {mean.error:.4f}")
    if config.output is not None:
        results = {name: score.summary() for name, score in scores.items()}
        content = {
            "format": _FORMAT,
            "model": config.model,
            "revision": commit_of(checkpoint.path),
            "window_start": start.summary(),
            "evaluation": results,
            "versions": versions(),
        }
        write_json(config.output, content)


if __name__ == "__main__":
    sys.exit(main())
