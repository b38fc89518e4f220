"""The weights of a block under a plan: masked by the ranking, in memory that candidates share."""

from collections.abc import Mapping

import torch
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import Ranks
from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.layout import Linear
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.workers.replica import Replica, Weights

_PLANS = 16
"""How many plans keep their counts on the device: the candidates of one step, which may pass each block together."""


class MaskedWeights:
    """Masks the blocks of one replica on its device; rankings may lie elsewhere."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._memory: dict[object, Tensor] = {}
        self._counts: dict[bytes, Counts] = {}

    def weights(self, index: int, plan: Plan, ranks: Mapping[Linear, Ranks], *, lasting: bool = False) -> Weights:
        """Return the weights of block `index` under `plan`; the next call overwrites them unless they are `lasting`."""
        masked, removed = {}, self._removed(plan)
        for spec in self._replica.layout.blocks[index]:
            weight = self._replica.weight(spec)
            masked[spec.linear] = zero_lowest(
                weight,
                ranks[spec.linear].to(self._replica.device),
                removed[spec.linear],
                out=None if lasting else self._memory_for(spec.linear.path, weight),
            )
        return masked

    def _memory_for(self, path: str, weight: Tensor) -> Tensor:
        """Return memory that all blocks with such a linear share: allocating it costs as much as masking."""
        place = (path, weight.shape, weight.stride(), weight.dtype)
        if place not in self._memory:
            self._memory[place] = torch.empty_like(weight)
        return self._memory[place]

    def _removed(self, plan: Plan) -> Counts:
        """Return the counts of this shard's rows on the device, copied once per plan: a copy waits for the device."""
        if self._replica.device.type == "cpu":
            return plan.removed
        if plan.digest not in self._counts:
            counts = {linear: rows for linear, rows in plan.removed.items() if linear.block in self._replica.blocks}
            on_device = torch.cat(list(counts.values())).to(self._replica.device)
            split = on_device.split([len(rows) for rows in counts.values()])
            self._counts[plan.digest] = dict(zip(counts, split, strict=True))
            if len(self._counts) > _PLANS:
                self._counts.pop(next(iter(self._counts)))
        return self._counts[plan.digest]
