"""How much memory a worker needs, and how many shards and replicas of a model suit the devices."""

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
_TEXTS = 4  # copies of a text's hidden states: before the first block, after the dense last, before and after one
_TEXTS_OF_A_LANE = 2  # before and after a block
_TOGETHER = 15  # candidates of a step
_IN_MLP, _IN_ATTENTION = (3, 2), (0, 9)  # activations of a chunk in a sub-block: widest and hidden widths


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run needs of its workers: bytes of a number, the type of device, and whether rankings or Grams are kept.

    `held` is the number of tokens of the texts that pass through the blocks as a whole.
    """

    item: int
    held: int
    device: str = "cuda"
    ranks: bool = True
    grams: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of each block's weights and rankings, of the rest of the model, and of the text that passes through.

    `text` is the size of one more candidate's hidden states, where candidates pass a block together. `parallel` is
    what the other thread lanes hold next to the first, where the model is whole on a CPU.
    """

    weights: tuple[int, ...]
    ranks: tuple[int, ...]
    outside: int
    passing: int
    text: int = 0
    parallel: int = 0

    @classmethod
    def of(cls, model: Model, work: Work) -> "Footprint":
        """Return the footprint of a model without weights."""
        _, blocks = find_blocks(model)
        shapes = [[tuple(weight_of(module).shape) for module in find_linears(block).values()] for block in blocks]
        weights = tuple(work.item * sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        everything = work.item * sum(parameter.numel() for parameter in model.parameters())
        widest = max(max(shape) for block in shapes for shape in block)
        largest = max(rows * columns for block in shapes for rows, columns in block)
        hidden = int(model.config.get_text_config().hidden_size)
        text = work.held * hidden * work.item
        lanes = most_lanes(max(weights)) if work.device == "cpu" else 1
        lane = (  # what each of the tasks in parallel holds
            max(weights)  # the masked copy of a block
            + max(wide * widest + narrow * hidden for wide, narrow in (_IN_MLP, _IN_ATTENTION))
            * CHUNK_TOKENS[work.device]
            * work.item
        )
        passing = (
            lane
            + (_SCORED * largest + _SORTED * min(largest, SLICES[work.device])) * work.ranks
            + 3 * 4 * widest**2 * work.grams
            + _TEXTS * text
        )
        return cls(
            weights=weights,
            ranks=tuple(
                work.ranks * sum(rows * columns * rank_dtype(columns).itemsize for rows, columns in block)
                for block in shapes
            ),
            outside=everything - sum(weights),
            passing=passing,
            text=text,
            parallel=(lanes - 1) * (lane + _TEXTS_OF_A_LANE * text),
        )

    def worker(self, shards: int) -> int:
        """Return the most bytes that one of `shards` workers holds."""
        blocks = [shard_blocks(len(self.weights), shard, shards) for shard in range(shards)]
        own = max(sum(self.weights[index] + self.ranks[index] for index in some) for some in blocks)
        return own + self.outside + self.passing + (self.parallel if shards == 1 else 0)

    def offloaded(self) -> int:
        """Return the most bytes on the device where blocks are offloaded: a block, the next, all candidates' text."""
        return 2 * max(self.weights) + max(self.ranks) + self.outside + self.passing + _TOGETHER * self.text


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that workers can run on, by the bytes of their memory; a node without GPUs is one device."""

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
    offload: bool = False

    def __str__(self) -> str:
        blocks = ", blocks offloaded to the host's memory" if self.offload else ""
        return (
            f"{self.replicas} replica{'s' * (self.replicas > 1)} x {self.shards} shard{'s' * (self.shards > 1)}, "
            f"{self.worker_bytes / GIB:.2f} of {self.device_bytes / GIB:.2f} GiB per worker{blocks}"
        )


def fit(footprint: Footprint, devices: Devices, *, shards: int | None = None, replicas: int | None = None) -> Fit:
    """Return as few shards as the memory allows and as many replicas as the devices then allow, or those given.

    Replicas come first: candidates on different replicas need no traffic. The smallest device sets the limit; more
    workers than devices share them. A model that all GPUs together cannot hold is one replica over all of them, its
    blocks offloaded to the host. Raises BadInput when even a few blocks do not fit.
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
    needed = footprint.offloaded()
    sharing = math.ceil((replicas or 1) * parts / count)
    if devices.kind == "GPU" and needed * sharing <= usable:
        device_bytes = usable // sharing
        return Fit(shards=parts, replicas=replicas or 1, worker_bytes=needed, device_bytes=device_bytes, offload=True)
    needed = footprint.worker(parts)
    raise BadInput(
        f"--shards: in {parts} shard{'s' * (parts > 1)} a worker needs {needed / GIB:.1f} GiB, there are {devices} "
        f"({usable / GIB:.1f} GiB of one can be used); add devices, or give fewer --replicas or more --shards"
    )


def needed_devices(footprint: Footprint, memory: int) -> int | None:
    """Return the shards that a model needs on devices of `memory` bytes; None if one block is too large."""
    usable = int(_USABLE * memory)
    for shards in range(1, len(footprint.weights) + 1):
        if footprint.worker(shards) <= usable:
            return shards
    return None
