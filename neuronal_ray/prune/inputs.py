"""What a run reads and checks before any weight is loaded: options, checkpoint, calibration and evaluation text."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.memory import machine_bytes
from neuronal_ray.core.pattern import check_pattern
from neuronal_ray.data.calibration import AUTO, OFF, RELEASED, Calibration, calibration_tokens
from neuronal_ray.data.text import warn_of_unused_columns
from neuronal_ray.evaluate.benchmark_names import split_names
from neuronal_ray.evaluate.inputs import read_evaluations, sequence_length
from neuronal_ray.evaluate.measure import Evaluations
from neuronal_ray.evaluate.window_start import WindowStart, possible_start, warn_of_tokenized
from neuronal_ray.models.checkpoint import Checkpoint, linear_columns, open_checkpoint
from neuronal_ray.models.encoder import load_encoder
from neuronal_ray.models.hub import resolve_model
from neuronal_ray.prune.compose import Composition, compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.workers.pools.launch import check_workers

_TOKEN_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that can be read and checked before any weight is loaded."""

    composition: Composition
    checkpoint: Checkpoint
    sequence_length: int
    drawn: Calibration
    evaluations: Evaluations
    window_start: WindowStart

    @property
    def calibration(self) -> Int64[Tensor, "samples length"]:
        """The sequences that the model is calibrated on."""
        return self.drawn.tokens


def held_tokens(config: PruneConfig, inputs: Inputs) -> int:
    """Return the number of tokens that pass through the workers as a whole: of the search text, or of all text."""
    composition = inputs.composition
    rows = composition.rows is not None and composition.rows.reads_calibration
    walks = composition.pruned_stream or composition.pruner.walks or rows
    return inputs.calibration.numel() if walks else config.search_samples * inputs.sequence_length


def _check_memory(config: PruneConfig, length: int) -> None:
    """Raise BadInput for a calibration text that this machine cannot hold."""
    needed = config.calibration_samples * length * _TOKEN_BYTES
    if needed > machine_bytes():
        raise BadInput(
            f"--calibration-samples: {config.calibration_samples} sequences of {length} tokens take "
            f"{needed / 2**30:,.0f} GiB, this machine has {machine_bytes() / 2**30:.0f}"
        )


def _packing(config: PruneConfig) -> str:
    """Return how calibration sequences are drawn: `paper` and `authors` mode join no documents unless told to."""
    if config.mode == "authors":
        return RELEASED
    return OFF if config.mode == "paper" and config.calibration_packing == AUTO else config.calibration_packing


class Reader:
    """Reads and checks what runs need before any weight is loaded; what several runs share is read once."""

    def __init__(self) -> None:
        self._checkpoints: dict[tuple[str, str | None, bool], Checkpoint] = {}
        self._calibrations: dict[tuple[object, ...], Calibration] = {}
        self._evaluations: dict[tuple[object, ...], Evaluations] = {}

    def prepare(self, config: PruneConfig, start: WindowStart | None = None) -> Inputs:
        """Read and check the checkpoint's headers, the calibration text and the evaluation text.

        `start` is how sequences begin where that was decided; where it is still auto, they begin with the text.
        """
        composition = compose(config)
        checkpoint = self._checkpoint(config)
        check_workers(config, checkpoint)
        if composition.pruner.pattern is not None:
            check_pattern(
                linear_columns(checkpoint, trust_remote_code=config.trust_remote_code), composition.pruner.pattern
            )
        length = sequence_length(config, checkpoint)
        _check_memory(config, length)
        start = start or self._start(config, checkpoint, composition.window_start, length)
        drawn = self._calibration(config, checkpoint, length, start)
        return Inputs(
            composition=composition,
            checkpoint=checkpoint,
            sequence_length=drawn.tokens.shape[1],
            drawn=drawn,
            evaluations=self._evaluated(config, checkpoint, length, start),
            window_start=start,
        )

    def _checkpoint(self, config: PruneConfig) -> Checkpoint:
        key = config.model, config.revision, config.trust_remote_code
        if key not in self._checkpoints:
            self._checkpoints[key] = open_checkpoint(
                resolve_model(config.model, config.revision), trust_remote_code=config.trust_remote_code
            )
        return self._checkpoints[key]

    def _start(self, config: PruneConfig, checkpoint: Checkpoint, asked: str, length: int) -> WindowStart:
        sources = (config.calibration, *split_names(config.evaluate)[0])
        if config.window_start is not None:
            warn_of_tokenized(sources)
        warn_of_unused_columns(sources, config.text_column)
        return possible_start(
            asked, sources, checkpoint.path, length=length, trust_remote_code=config.trust_remote_code
        )

    def _calibration(self, config: PruneConfig, checkpoint: Checkpoint, length: int, start: WindowStart) -> Calibration:
        packing = _packing(config)
        key = (
            checkpoint.path,
            config.calibration,
            config.calibration_samples,
            length,
            config.seed,
            packing,
            start.token,
            config.text_column,
        )
        if key not in self._calibrations:
            self._calibrations[key] = calibration_tokens(
                config.calibration,
                load_encoder(checkpoint.path, trust_remote_code=config.trust_remote_code),
                samples=config.calibration_samples,
                sequence_length=length,
                seed=config.seed,
                vocabulary=checkpoint.config.get_text_config().vocab_size,
                bos=start.token,
                packing=packing,
                columns=config.text_column,
            )
        return self._calibrations[key]

    def _evaluated(self, config: PruneConfig, checkpoint: Checkpoint, length: int, start: WindowStart) -> Evaluations:
        rows = config.few_shot, config.task_limit, config.task_data
        key = (checkpoint.path, config.evaluate, length, rows, start.used, config.text_column)
        if key not in self._evaluations:
            self._evaluations[key] = read_evaluations(config, config.evaluate, checkpoint, length=length, start=start)
        return self._evaluations[key]
