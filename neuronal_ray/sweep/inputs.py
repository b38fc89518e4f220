"""What a sweep reads and checks before any weight is loaded, and the order in which its cells run."""

from dataclasses import dataclass
from functools import cache

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.versions import versions
from neuronal_ray.evaluate.benchmark_names import MEAN, ZERO_SHOT
from neuronal_ray.prune.inputs import Inputs, Reader
from neuronal_ray.prune.session import digest_of
from neuronal_ray.sweep.config import Cell, Study
from neuronal_ray.workers.pools.launch import check_device


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cell with everything that can be read and checked before any weight is loaded.

    `sets_budget`: other cells take the sparsity that this one achieves as their target. `text` is the digest of the
    calibration text.
    """

    cell: Cell
    inputs: Inputs
    text: str
    sets_budget: bool = False

    @property
    def place(self) -> tuple[object, ...]:
        """Return a key that is equal for cells that share a pool."""
        config = self.cell.config
        return (
            str(self.inputs.checkpoint.path),
            config.address or "",
            config.replicas or 0,
            config.device,
            config.dtype,
            config.threads or 0,
            config.trust_remote_code,
        )

    @property
    def ranking(self) -> tuple[str, ...]:
        """Return a key that is equal for cells that share a calibration text and a ranking."""
        composition = self.inputs.composition
        kind = composition.dense_statistic
        return (
            *map(str, self.place),
            self.text,
            str(not self.sets_budget),  # those of a text that set budgets come first
            str(composition.released),
            repr(composition.pruner),
            "" if kind is None else kind.__name__,
        )

    @property
    def order(self) -> tuple[str, ...]:
        """Return a sorting key: cells next to one another share most."""
        composition = self.inputs.composition
        search = (composition.criterion, str(self.cell.config.search_samples), str(composition.levels))
        return (*self.ranking, *search)

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions that the cell's results depend on, with those of its plug-ins."""
        config = self.cell.config
        return _versions(config.method, self.inputs.composition.allocation, config.row_step or "", config.refinement)

    @property
    def expected(self) -> set[str]:
        """Return the names of the results that the cell will have."""
        evaluations = self.inputs.evaluations
        return {*evaluations.names, *([MEAN] if set(ZERO_SHOT) <= set(evaluations.benchmarks) else [])}


@cache
def _versions(*plug_ins: str) -> dict[str, str]:
    return versions(*plug_ins)


def prepare_study(study: Study, reader: Reader) -> list[Ready]:
    """Check every cell and read every text, each once. Raises BadInput that names the cell."""
    digests: dict[int, str] = {}  # by the id of a text, which the reader holds and cells share
    budgets = {cell.budget_of for cell in study.cells}
    ready = []
    for cell in study.cells:
        try:
            check_device(cell.config)
            inputs = reader.prepare(cell.config)
            if (key := id(inputs.calibration)) not in digests:
                digests[key] = digest_of(inputs.calibration)
            ready.append(Ready(cell=cell, inputs=inputs, text=digests[key], sets_budget=cell.id in budgets))
        except BadInput as error:
            raise BadInput(f"cell {cell}: {error}") from error
    return sorted(ready, key=lambda member: member.order)
