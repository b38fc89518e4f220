"""How a task passes along a chain of shards: what it does at the first shard, between shards and at the last."""

from collections.abc import Callable, Generator
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


Steps = Generator[Passing[State], Passing[State], Result]
"""What a chain task is written as: a generator with two yields, which are described in ChainTask."""


@dataclass(frozen=True)
class ChainTask(Generic[P, State, Result]):
    """A task whose texts pass through every block of the model, whichever shards hold them.

    `steps` is a generator function of the worker and the task's arguments, with two yields. The first gives the texts
    as they enter the first block of the model, and the initial state; it receives the texts as they enter this shard,
    and the state so far. The second gives the texts as they leave this shard, and the state. What follows runs in the
    last shard only and returns the result. What comes before the first yield runs in every shard: later shards need
    the arguments that their blocks are called with.
    """

    steps: Callable[Concatenate[Worker, P], Steps[State, Result]]

    @property
    def name(self) -> str:
        """What errors and metrics call the task."""
        return self.steps.__name__.lstrip("_")

    def __call__(self, worker: Worker, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Return the result on a worker that holds all blocks."""
        assert worker.spec.shards == 1, "one shard of several hands over, see run"
        return _ended(self._leaving(worker, None, *args, **kwargs)[0])

    def run(
        self, worker: Worker, handover: Handover[State] | None, /, *args: P.args, **kwargs: P.kwargs
    ) -> Handover[State] | Result:
        """Run on one shard, given what the shard before handed over: the result in the last, else a handover."""
        steps, leaving = self._leaving(worker, handover, *args, **kwargs)
        if worker.is_last:
            return _ended(steps)
        return Handover([[recording.hidden for recording in text] for text in leaving.texts], leaving.state)

    def _leaving(
        self, worker: Worker, handover: Handover[State] | None, /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Steps[State, Result], Passing[State]]:
        """Return the steps at their second yield, and what they gave there."""
        steps = self.steps(worker, *args, **kwargs)
        entering = next(steps)
        if handover is not None:
            entering = handover.entering(entering, worker.device)
        return steps, steps.send(entering)


def _ended(steps: Steps[Any, Result]) -> Result:
    try:
        next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise AssertionError("a chain task has two yields")


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
