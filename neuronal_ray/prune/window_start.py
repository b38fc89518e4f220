"""The window start of a run: where it is auto, decided by the dense model before anything else is computed."""

import math
from pathlib import Path
from typing import Literal

from neuronal_ray.cli.progress import Progress
from neuronal_ray.data.text import is_tokenized
from neuronal_ray.data.window_start import AUTO
from neuronal_ray.evaluate.window_start import Readings, WindowStart, read_both
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.inputs import Inputs, Reader
from neuronal_ray.prune.journal import Journal, Number
from neuronal_ray.prune.session import Tokens, digest_of
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.tasks.statistics import fingerprint

_KIND: Literal["window start"] = "window start"


def with_window_start(
    config: PruneConfig, inputs: Inputs, pool: Pool, reader: Reader, progress: Progress, *, journal: Path | None
) -> Inputs:
    """Return the inputs whose sequences begin as the dense model reads them better; as they are where that is known.

    The first windows of the calibration text decide, or those of the first evaluation text where the calibration text
    is tokenized. What was measured is kept in the folder `journal`, and taken from there.
    """
    if inputs.window_start.used != AUTO:
        return inputs
    start = inputs.window_start.decided(
        _readings(deciding_windows(config, inputs), inputs.window_start, pool, progress, journal=journal)
    )
    return reader.prepare(config, start)


def deciding_windows(config: PruneConfig, inputs: Inputs) -> Tokens:
    """Return the windows that decide."""
    if not is_tokenized(config.calibration):
        return inputs.calibration
    assert inputs.evaluations.undecided is not None, "one of the sources is text"
    return inputs.evaluations.undecided.tokens


def _readings(windows: Tokens, start: WindowStart, pool: Pool, progress: Progress, *, journal: Path | None) -> Readings:
    """Measure, once for the same windows and model: on another device the choice of an earlier run holds."""
    if journal is None:
        return read_both(pool, windows, start, progress)
    key = bytes.fromhex(digest_of(windows))
    noted = Journal(journal / "window-start", {"model": pool.first(fingerprint)})
    for number in noted.numbers():
        if (number.kind, number.key) == (_KIND, key):
            papers, bos = number.values
            return Readings(papers=papers, bos=bos)
    readings = read_both(pool, windows, start, progress)
    if math.isfinite(readings.papers) and math.isfinite(readings.bos):
        noted.note(Number(_KIND, key, (readings.papers, readings.bos)))
    return readings
