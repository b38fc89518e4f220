"""Blocks whose weights stay in the host's memory and visit the device one at a time, for models that do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neuronal_ray.models.experts import experts_of


class Residence:
    """Takes a block's weights to the device and, meanwhile, those of the one after it.

    Weights on the host are pinned for a GPU, so that copies run beside the computation. On a CPU a visit is a copy.
    """

    def __init__(self, blocks: nn.ModuleList, present: range, device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._here: set[int] = set()
        self._fetched: dict[int, list[Tensor]] = {}
        if self._side is not None:
            for index in present:
                for tensor in self._tensors(index):
                    tensor.data = tensor.data.pin_memory()
                self._point_experts(index)

    @contextmanager
    def at(self, index: int, *, then: int | None = None) -> Iterator[None]:
        """Block `index` is on the device while this lasts; `then` is the block that will be wanted next."""
        if index in self._here:
            yield
            return
        tensors = self._tensors(index)
        hosts = [tensor.data for tensor in tensors]
        copies = self._fetched.pop(index, None) or self._fetch(index)
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            for copy in copies:
                copy.record_stream(torch.cuda.current_stream(self._device))
        self._put(index, copies)
        self._here.add(index)
        self._fetched = {then: self._fetch(then)} if then is not None and self._side is not None else {}
        try:
            yield
        finally:
            self._here.discard(index)
            self._put(index, hosts)

    def _tensors(self, index: int) -> list[Tensor]:
        """Parameters and buffers of one block."""
        return [*self._blocks[index].parameters(), *self._blocks[index].buffers()]

    def _fetch(self, index: int) -> list[Tensor]:
        """Copies on the device, under way on a stream of their own if it is a GPU."""
        if self._side is None:
            return [tensor.data.clone() for tensor in self._tensors(index)]
        with torch.cuda.stream(self._side):
            return [tensor.data.to(self._device, non_blocking=True) for tensor in self._tensors(index)]

    def _put(self, index: int, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(index), values, strict=True):
            tensor.data = value
        self._point_experts(index)

    def _point_experts(self, index: int) -> None:
        """An expert's weight is a view of its stack, wherever that is now."""
        for module in self._blocks[index].modules():
            for expert in experts_of(module).values():
                expert.weight.data = module.get_parameter(expert.stack).data[expert.index]
