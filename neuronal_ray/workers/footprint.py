"""How much memory a worker needs, and in how many shards and replicas a model lies best on the devices there are."""

import math
from dataclasses import dataclass

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.ranking import SLICES, rank_dtype
from neuronal_ray.models.blocks import Model, find_blocks, find_linears, weight_of
from neuronal_ray.workers.replica import CHUNK_TOKENS, shard_blocks
from neuronal_ray.workers.thread_lanes import most_lanes

GIB = 2**30

CHUNKS_PER_TASK = 4
"""The most chunks of an evaluation text that one task passes through the blocks."""

_USABLE = 0.92  # of a device's memory: the rest is the driver's context and what allocation wastes
_SCORED = 16  # bytes per weight of the linear that is being ranked: float32 score and its factors, ranks and a copy
_SORTED = 24  # and per score of the slice that is being sorted: int64 positions, values, copies
_STREAMS = 4  # copies of a text's hidden states: before the first block, after the dense last, before and after one
_STREAMS_OF_A_LANE = 2  # before and after a block
_TOGETHER = 15  # candidates of a step
_IN_MLP, _IN_ATTENTION = (3, 2), (0, 9)  # activations of a chunk in either half, in widths of the widest and of hidden


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run asks of its workers: bytes of a number, tokens held at once, the type of device, and whether it keeps
    rankings, or Grams.

    `held` are the tokens of the texts that pass through the blocks as a whole.
    """

    item: int
    held: int
    device: str = "cuda"
    ranks: bool = True
    grams: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes: of each block's weights and rankings, of what lies outside the blocks, and of what passes through."""

    weights: tuple[int, ...]
    ranks: tuple[int, ...]
    outside: int
    passing: int
    stream: int = 0
    """One more candidate's hidden states, where candidates pass a block together."""
    beside: int = 0
    """What goes side by side with the first task, where the model is whole on a CPU."""

    @classmethod
    def of(cls, model: Model, work: Work) -> "Footprint":
        """Of a model without weights."""
        _, blocks = find_blocks(model)
        shapes = [[tuple(weight_of(module).shape) for module in find_linears(block).values()] for block in blocks]
        weights = tuple(work.item * sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        everything = work.item * sum(parameter.numel() for parameter in model.parameters())
        widest = max(max(shape) for block in shapes for shape in block)
        largest = max(rows * columns for block in shapes for rows, columns in block)
        hidden = int(model.config.get_text_config().hidden_size)
        stream = work.held * hidden * work.item
        lanes = most_lanes(max(weights)) if work.device == "cpu" else 1
        lane = (  # what each task holds of those that go side by side
            max(weights)  # the pruned copy of a block
            + max(wide * widest + narrow * hidden for wide, narrow in (_IN_MLP, _IN_ATTENTION))
            * CHUNK_TOKENS[work.device]
            * work.item
        )
        passing = (
            lane
            + (_SCORED * largest + _SORTED * min(largest, SLICES[work.device])) * work.ranks
            + 3 * 4 * widest**2 * work.grams
            + _STREAMS * stream
        )
        return cls(
            weights=weights,
            ranks=tuple(
                work.ranks * sum(rows * columns * rank_dtype(columns).itemsize for rows, columns in block)
                for block in shapes
            ),
            outside=everything - sum(weights),
            passing=passing,
            stream=stream,
            beside=(lanes - 1) * (lane + _STREAMS_OF_A_LANE * stream),
        )

    def worker(self, shards: int) -> int:
        """The most that one of `shards` workers holds."""
        blocks = [shard_blocks(len(self.weights), shard, shards) for shard in range(shards)]
        own = max(sum(self.weights[index] + self.ranks[index] for index in some) for some in blocks)
        return own + self.outside + self.passing + (self.beside if shards == 1 else 0)

    def streaming(self) -> int:
        """The most that a worker holds on its device when blocks visit it: one, the next, and all candidates' text."""
        return 2 * max(self.weights) + max(self.ranks) + self.outside + self.passing + _TOGETHER * self.stream


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where workers can run: the memory of each device in bytes. A node without GPUs is one device."""

    kind: str
    memory: tuple[int, ...]

    def __str__(self) -> str:
        sizes = sorted({f"{size / GIB:.0f}" for size in self.memory}, key=float)
        return f"{len(self.memory)} x {self.kind} of {' to '.join(sizes)} GiB"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`replicas` chains of `shards` workers; a worker needs `worker_bytes` of the `device_bytes` that it may take."""

    shards: int
    replicas: int
    worker_bytes: int
    device_bytes: int
    streams: bool = False

    def __str__(self) -> str:
        blocks = ", blocks visit from the host's memory" if self.streams else ""
        return (
            f"{self.replicas} replica{'s' * (self.replicas > 1)} x {self.shards} shard{'s' * (self.shards > 1)}, "
            f"{self.worker_bytes / GIB:.2f} of {self.device_bytes / GIB:.2f} GiB per worker{blocks}"
        )


def fit(footprint: Footprint, devices: Devices, *, shards: int | None = None, replicas: int | None = None) -> Fit:
    """As few shards as the memory allows, as many replicas as the devices then allow, or what is asked for.

    Replicas come first: candidates over replicas need no traffic. The smallest device sets the measure; more workers
    than devices share them. A model that all GPUs together cannot hold is one replica over all of them whose blocks
    stay on the host and visit. Raises BadInput when even a few blocks do not fit.
    """
    count, usable = len(devices.memory), int(_USABLE * min(devices.memory))
    num_blocks = len(footprint.weights)
    if shards is not None and shards > num_blocks:
        raise BadInput(f"--shards: {shards} shards of a model of {num_blocks} blocks; a shard has at least one")
    for number in range(1, num_blocks + 1) if shards is None else (shards,):
        chains = replicas or max(1, count // number)
        sharing = math.ceil(chains * number / count)
        needed = footprint.worker(number)
        if needed * sharing <= usable:
            return Fit(shards=number, replicas=chains, worker_bytes=needed, device_bytes=usable // sharing)
        if shards is None and number * (replicas or 1) >= count:
            break
    parts = number if shards is None else shards
    needed = footprint.streaming()
    sharing = math.ceil((replicas or 1) * parts / count)
    if devices.kind == "GPU" and needed * sharing <= usable:
        device_bytes = usable // sharing
        return Fit(shards=parts, replicas=replicas or 1, worker_bytes=needed, device_bytes=device_bytes, streams=True)
    needed = footprint.worker(parts)
    raise BadInput(
        f"--shards: in {parts} shard{'s' * (parts > 1)} a worker needs {needed / GIB:.1f} GiB, there are {devices} "
        f"({usable / GIB:.1f} GiB of one can be used); add devices, or give fewer --replicas or more --shards"
    )


def needed_devices(footprint: Footprint, memory: int) -> int | None:
    """The shards that a model needs on devices of `memory` bytes; None if one block is too large."""
    usable = int(_USABLE * memory)
    for shards in range(1, len(footprint.weights) + 1):
        if footprint.worker(shards) <= usable:
            return shards
    return None
