"""How a task passes along a chain of shards: what it does at the first shard, in every shard, and at the last."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.worker import Worker

P = ParamSpec("P")
State = TypeVar("State")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Passing(Generic[State]):
    """Texts between two blocks of the model, in chunks, and what the task has gathered so far."""

    texts: list[list[Recording]]
    state: State


@dataclass(frozen=True)
class Handover(Generic[State]):
    """What a shard hands to the next: the hidden states of each chunk of each text, and what was gathered so far.

    `seconds` is the time that a Timed task has taken in the shards so far.
    """

    hidden: list[list[Float[Tensor, "sequences tokens features"]]]
    state: State
    seconds: float = 0.0

    def entering(self, own: Passing[State], device: torch.device) -> Passing[State]:
        """Return the texts as they enter this shard: the hidden states handed over, with this shard's arguments."""
        texts = [
            [
                Recording(hidden.to(device), recording.calls)
                for hidden, recording in zip(chunks, recordings, strict=True)
            ]
            for chunks, recordings in zip(self.hidden, own.texts, strict=True)
        ]
        return Passing(texts, self.state)


@dataclass(frozen=True)
class ChainTask(Generic[P, State, Result]):
    """A task whose texts pass through every block, whichever shards hold them.

    `start` returns the texts as they enter the first block of the model and the initial state. It is called in every
    shard: later shards need the arguments that their blocks are called with. `through` passes the texts through the
    blocks of one shard and adds to the state. `end` makes the result in the last shard.
    """

    name: str
    start: Callable[Concatenate[Worker, P], Passing[State]]
    through: Callable[Concatenate[Worker, Passing[State], P], Passing[State]]
    end: Callable[Concatenate[Worker, Passing[State], P], Result]

    def __call__(self, worker: Worker, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Return the result on a worker that holds all blocks."""
        assert worker.spec.shards == 1, "one shard of several hands over, see run"
        passing = self.through(worker, self.start(worker, *args, **kwargs), *args, **kwargs)
        return self.end(worker, passing, *args, **kwargs)

    def run(
        self, worker: Worker, handover: Handover[State] | None, /, *args: P.args, **kwargs: P.kwargs
    ) -> Handover[State] | Result:
        """Run on one shard, given what the shard before handed over: the result in the last, else a handover."""
        passing = self.start(worker, *args, **kwargs)
        if handover is not None:
            passing = handover.entering(passing, worker.device)
        passing = self.through(worker, passing, *args, **kwargs)
        if worker.is_last:
            return self.end(worker, passing, *args, **kwargs)
        return Handover([[recording.hidden for recording in text] for text in passing.texts], passing.state)


@dataclass(frozen=True)
class Timed(Generic[P, State, Result]):
    """A chain task that also returns the seconds it took in all shards.

    Tasks that run in parallel on one worker share its time.
    """

    task: ChainTask[P, State, Result]

    @property
    def name(self) -> str:
        """The name of the task that is timed."""
        return self.task.name

    def __call__(self, worker: Worker, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Result, float]:
        """Return the result and the seconds on a worker that holds all blocks."""
        begin = perf_counter()
        result = self.task(worker, *args, **kwargs)
        return result, (perf_counter() - begin) / worker.parallel

    def run(
        self, worker: Worker, handover: Handover[State] | None, /, *args: P.args, **kwargs: P.kwargs
    ) -> Handover[State] | tuple[Result, float]:
        """Run on one shard, see ChainTask.run."""
        begin = perf_counter()
        result = self.task.run(worker, handover, *args, **kwargs)
        seconds = (perf_counter() - begin) / worker.parallel + (0.0 if handover is None else handover.seconds)
        return replace(result, seconds=seconds) if isinstance(result, Handover) else (result, seconds)


def run_task(
    worker: Worker, handover: Any, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
) -> Any:
    """Run any task on one shard; `handover` is what the shard before returned, None in the first.

    A plain function runs on each shard by itself, and the result of the last one counts.
    """
    if isinstance(task, ChainTask | Timed):
        return task.run(worker, handover, *args, **kwargs)
    return task(worker, *args, **kwargs)


def task_name(task: Callable[..., object]) -> str:
    """Return what errors and metrics call a task."""
    name: str = getattr(task, "name", None) or task.__name__
    return name


def gathered(worker: Worker, passing: Passing[State], /, *_: object, **__: object) -> State:
    """Return what a task has gathered: the `end` of tasks whose state is their result."""
    return passing.state


def nothing(worker: Worker, passing: Passing[Any], /, *_: object, **__: object) -> None:
    """End a task that is called for what it keeps on the workers."""
