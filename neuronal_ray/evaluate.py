"""`python -m neuronal_ray.evaluate`: perplexity of a model, dense or pruned, on one or more texts."""

import sys
from collections.abc import Sequence

from neuronal_ray.config import EvaluateConfig, parse_config
from neuronal_ray.entry import exit_code

_DESCRIPTION = """Measure the perplexity of a model by the protocol of the pruning papers: consecutive windows, losses
in float32. Example: neuronal-ray evaluate --model pruned --evaluate wikitext2,c4,ptb"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray evaluate", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(EvaluateConfig, argv, prog="neuronal-ray evaluate", description=_DESCRIPTION)
    # What follows imports torch and transformers: after the options are known to be good.
    from neuronal_ray.launch import check_device, open_pool
    from neuronal_ray.models.checkpoint import open_checkpoint, resolve_model
    from neuronal_ray.output import write_json
    from neuronal_ray.pipeline import evaluate_dense, read_windows, sequence_length, versions
    from neuronal_ray.progress import Progress

    if config.output is not None and not config.output.absolute().parent.is_dir():
        raise ValueError(f"--output: no directory {config.output.absolute().parent}")
    check_device(config)
    checkpoint = open_checkpoint(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    length = sequence_length(config, checkpoint)
    windows = read_windows(config.evaluate, checkpoint, length=length, trust_remote_code=config.trust_remote_code)
    progress = Progress()
    with open_pool(config, checkpoint) as pool:
        results = evaluate_dense(pool, windows, progress)
    for name, measured in results.items():
        print(f"{name}: perplexity {measured['perplexity']} ({measured['windows']} windows of {length} tokens)")
    if config.output is not None:
        content = {"model": config.model, "evaluation": results, "versions": versions()}
        write_json(config.output, content)


if __name__ == "__main__":
    sys.exit(main())
