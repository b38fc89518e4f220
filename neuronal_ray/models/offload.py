"""Offloading for models that do not fit: block weights stay on the host and are copied to the device one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neuronal_ray.models.experts import experts_of


class OffloadedBlocks:
    """Copies a block's weights to the device and prefetches those of the next block.

    For a GPU the host's weights are pinned, so that copies overlap with computation. A CPU only clones them.
    """

    def __init__(self, blocks: nn.ModuleList, present: range, device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_device: set[int] = set()
        self._prefetched: dict[int, list[Tensor]] = {}
        if self._copying is not None:
            for index in present:
                for tensor in self._tensors(index):
                    tensor.data = tensor.data.pin_memory()
                self._point_experts(index)

    @contextmanager
    def resident(self, index: int, *, then: int | None = None) -> Iterator[None]:
        """Keep block `index` on the device within the context; `then` is the block to prefetch."""
        if index in self._on_device:
            yield
            return
        hosts = [tensor.data for tensor in self._tensors(index)]
        copies = self._prefetched.pop(index, None) or self._copy(index)
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copying)
            for copy in copies:
                copy.record_stream(torch.cuda.current_stream(self._device))
        self._replace(index, copies)
        self._on_device.add(index)
        self._prefetched = {then: self._copy(then)} if then is not None and self._copying is not None else {}
        try:
            yield
        finally:
            self._on_device.discard(index)
            self._replace(index, hosts)

    def _tensors(self, index: int) -> list[Tensor]:
        """List the parameters and buffers of one block."""
        return [*self._blocks[index].parameters(), *self._blocks[index].buffers()]

    def _copy(self, index: int) -> list[Tensor]:
        """Return copies on the device; on a GPU they may still be in progress, on a CUDA stream of their own."""
        if self._copying is None:
            return [tensor.data.clone() for tensor in self._tensors(index)]
        with torch.cuda.stream(self._copying):
            return [tensor.data.to(self._device, non_blocking=True) for tensor in self._tensors(index)]

    def _replace(self, index: int, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(index), values, strict=True):
            tensor.data = value
        self._point_experts(index)

    def _point_experts(self, index: int) -> None:
        """Make each expert's weight a view of its stack's current memory."""
        for module in self._blocks[index].modules():
            for expert in experts_of(module).values():
                expert.weight.data = module.get_parameter(expert.stack).data[expert.index]
