"""The texts and benchmarks of an evaluation, read and checked before any weight is loaded."""

from collections.abc import Sequence

from neuronal_ray.cli.config import BenchmarkConfig, RunConfig
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.windows import evaluation_name, evaluation_windows
from neuronal_ray.evaluate.benchmark_names import split_names
from neuronal_ray.evaluate.measure import Evaluations, Windows
from neuronal_ray.evaluate.scores import BenchmarkSettings
from neuronal_ray.evaluate.window_start import WindowStart
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.encoder import load_encoder

_DEFAULT_LENGTH = 2048


def sequence_length(config: RunConfig, checkpoint: Checkpoint) -> int:
    """Return --sequence-length or its default: 2048, or the model's context if that is shorter."""
    context = context_length(checkpoint)
    if config.sequence_length is None:
        return min(_DEFAULT_LENGTH, context)
    if config.sequence_length > context:
        raise BadInput(f"--sequence-length: {config.sequence_length} is beyond the model's context of {context}")
    return config.sequence_length


def context_length(checkpoint: Checkpoint) -> int:
    """Return the longest sequence that the model was made for, in tokens; models without positions have no limit."""
    try:
        return int(checkpoint.config.get_text_config().max_position_embeddings)
    except AttributeError:
        return 2**31


def read_evaluations(
    config: BenchmarkConfig, names: Sequence[str], checkpoint: Checkpoint, *, length: int, start: WindowStart
) -> Evaluations:
    """Read the texts among `names` as windows of `length` tokens, and check that the benchmarks' rows can be read."""
    texts, benchmarks = split_names(names)
    settings = BenchmarkSettings(few_shot=config.few_shot, limit=config.task_limit, data=config.task_data)
    windows = read_windows(
        texts,
        checkpoint,
        length=length,
        trust_remote_code=config.trust_remote_code,
        start=start,
        columns=config.text_column,
    )
    if benchmarks:
        from neuronal_ray.evaluate.benchmarks import check_benchmarks  # lm-eval takes seconds to import

        check_benchmarks(benchmarks, settings)
    return Evaluations(windows=windows, benchmarks=benchmarks, settings=settings)


def read_windows(
    sources: Sequence[str],
    checkpoint: Checkpoint,
    *,
    length: int,
    trust_remote_code: bool,
    start: WindowStart,
    columns: tuple[str, ...] = (),
) -> dict[str, Windows]:
    """Return the windows of every source, by the name that results have it under."""
    windows: dict[str, Windows] = {}
    for source in sources:
        name = evaluation_name(source)
        if name in windows:
            raise BadInput(f"--evaluate: two texts are called {name!r}; rename one file")
        tokens = evaluation_windows(
            source,
            load_encoder(checkpoint.path, trust_remote_code=trust_remote_code),
            sequence_length=length,
            vocabulary=checkpoint.config.get_text_config().vocab_size,
            bos=start.token,
            columns=columns,
        )
        if tokens.shape[1] > context_length(checkpoint):
            raise BadInput(f"--evaluate: rows of {source} are longer than the model's {context_length(checkpoint)}")
        windows[name] = Windows(tokens=tokens, start=start.of(source))
    return windows
