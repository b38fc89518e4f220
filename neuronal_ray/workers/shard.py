"""What does a shard of the model get from the one before it, and hand to the next?

In a chain of shards a task runs on one after the other. What it needs of the text, and what was found so far, a task
takes from its own arguments at the first shard and from what was handed to it at any other; what the last one gives is
the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Generic, TypeVar, cast

from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.layout import Layout
from neuronal_ray.models.blocks import Recording
from neuronal_ray.models.wiring import Kinds
from neuronal_ray.workers.replica import Replica
from neuronal_ray.workers.spec import WorkerSpec

Result = TypeVar("Result")
State = TypeVar("State")


@dataclass(frozen=True)
class Handed(Generic[State]):
    """What a shard hands to the next: the hidden states of each chunk of its streams, and what was found so far.

    `seconds` that a task took so far, where that is asked for.
    """

    streams: Sequence[Sequence[Float[Tensor, "sequences tokens features"]]]
    found: State
    seconds: float = 0.0


class Shard:
    """Some contiguous blocks of the model, or all, on one device; tasks are methods of what is made of it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.replica = Replica(
            spec.model_path,
            device=spec.device,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            synchronize=spec.profile,
            shard=spec.shard,
            shards=spec.shards,
            streams=spec.streams,
        )
        self.device, self.stopwatch = self.replica.device, self.replica.stopwatch
        self.blocks = self.replica.blocks
        self._handed: object = None
        self._upstream: Callable[..., object] | None = None
        self._sharing = 1  # tasks under way at the same time, this one included

    @property
    def layout(self) -> Layout:
        """The layout of the whole model; in a chain, once it was kept."""
        return self.replica.layout

    def relay(self, handed: object, task: Callable[..., Result], *args: object) -> Result:
        """`task(self, *args)` given what the shard before returned; None at the first shard of a chain."""
        before, self._handed = self._handed, handed
        try:
            return task(self, *args)
        finally:
            self._handed = before

    def set_upstream(self, upstream: Callable[..., object]) -> None:
        """How the last shard asks those before it: `upstream(task, *args)` is what they would hand to it."""
        self._upstream = upstream

    def _take(self, streams: list[list[Recording]], found: State) -> tuple[list[list[Recording]], State]:
        """Streams of text as they enter this shard, and what was found so far: at the first shard what is given.

        Further down `streams` say with which arguments the blocks are called.
        """
        if self._handed is None:
            return list(streams), found
        handed = cast(Handed[State], self._handed)
        entering = [
            [Recording(hidden.to(self.device), own.calls) for hidden, own in zip(chunks, recordings, strict=True)]
            for chunks, recordings in zip(handed.streams, streams, strict=True)
        ]
        return list(entering), handed.found

    def _give(self, streams: list[list[Recording]], found: object, end: Callable[[], Result]) -> Result:
        """What this shard returns: the task's result if it is the last, else what it hands on in its place."""
        if self.is_last:
            return end()
        hidden = [[recording.hidden for recording in recordings] for recordings in streams]
        return cast(Result, Handed(hidden, found))

    def timed(self, task: Callable[..., Result], *args: object) -> tuple[Result, float]:
        """What `task(worker, *args)` returns, and the seconds that it took in all shards: its share of those of tasks
        that go beside it.
        """
        before = self._handed.seconds if isinstance(self._handed, Handed) else 0.0
        begin = perf_counter()
        found = task(self, *args)
        seconds = before + (perf_counter() - begin) / self._sharing
        if isinstance(found, Handed):
            return cast(tuple[Result, float], replace(found, seconds=seconds))
        return found, seconds

    @property
    def is_last(self) -> bool:
        """Whether the last block is here, and with it the results of tasks."""
        return self.blocks.stop == self.replica.num_blocks

    def trace(self) -> Layout | Kinds:
        """The layout, which the shards of a chain find together; each is handed the kinds of blocks before it."""
        known = self.replica.trace(cast(Kinds, self._handed or Kinds()))
        return self.layout if self.is_last else known

    def keep_layout(self, layout: Layout) -> None:
        """The layout that the last shard found."""
        self.replica.keep_layout(layout)

    def describe(self) -> Layout:
        """The layout of the model."""
        return self.layout
