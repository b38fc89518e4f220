"""What is the model in the end? Masks or weights are settled, text passes through it, its files are written."""

import copy
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import Ranks
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.memory import keep_freed_memory
from neuronal_ray.core.layout import Linear
from neuronal_ray.core.masks import cut
from neuronal_ray.core.plan import Plan
from neuronal_ray.models.blocks import is_transposed
from neuronal_ray.models.output_files import Part, stored_tensors
from neuronal_ray.models.tensor_copies import copy_tensors, new_part, write_weights, zero_masked
from neuronal_ray.workers.background import Background
from neuronal_ray.workers.block_work import check_finite
from neuronal_ray.workers.replica import Stopped, Weights
from neuronal_ray.workers.spec import Walk, WorkerSpec
from neuronal_ray.workers.tasks.probes import ProbeTasks
from neuronal_ray.workers.tasks.solver_candidates import SolverTasks

Result = TypeVar("Result")


class ResultTasks(SolverTasks, ProbeTasks):
    """Tasks on the model under a final plan: a cut of the ranking, or what `finish` settled."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._final: dict[Linear, Ranks] = {}
        self._solved: dict[Linear, Tensor] = {}
        self._ahead: Background[int] = Background()

    def unfinish(self) -> None:
        """The final masks are cuts of the ranking again."""
        self._final, self._solved = {}, {}

    def finish(self, plan: Plan, tokens: Int64[Tensor, "sequences length"], walk: Walk) -> None:
        """Settle the masks, or weights, that the model has under `plan` in the end.

        A ranking on the dense stream is settled already; else `tokens` pass through, block after block.
        """
        pruner = self.pruner
        self._final, self._solved = dict(self._ranks), {}
        if not walk.pruned and not pruner.walks:
            if pruner.refinement is not None:
                for index in self.replica.visited(self.blocks):
                    refined = self._refined(index, plan, self._ranking(index), self._statistics, self._statistics)
                    self._final |= self._kept(refined)
            return None
        (recordings,), _ = self._take([self.replica.start(tokens, chunk=1 if walk.released else None)[1]], None)
        kinds = walk.kinds(pruner.final_statistics)
        for index in self.replica.visited(self.blocks):
            with self.stopwatch.measure("dense pass"):
                outputs, observed = self.replica.run(index, recordings, kinds)
            for statistics in observed:
                check_finite(statistics)
            weights, ranks = self._pruned_block(index, plan, observed)
            self._final |= self._kept(ranks)
            if pruner.solves:
                self._solved |= {linear: weight.to(self._host) for linear, weight in weights.items()}
            if walk.pruned:
                outputs, _ = self.replica.run_with(index, recordings, weights)
            recordings = outputs
        return self._give([recordings], None, lambda: None)

    def logits(
        self,
        tokens: Int64[Tensor, "sequences length"],
        plan: Plan | None,
        read: Callable[[Iterator[Float[Tensor, "sequences length vocabulary"]]], Result],
    ) -> Result:
        """What `read` makes of the logits, chunk by chunk, of the model as `finish` left it under `plan`.

        None is the dense model.
        """
        parts, recordings = self.replica.start(tokens)
        (recordings,), _ = self._take([recordings], None)
        for index in self.replica.visited(self.blocks):
            if plan is None:
                recordings, _ = self.replica.run(index, recordings)
            else:
                recordings, _ = self.replica.run_with(index, recordings, self._finished(index, plan))
        return self._give([recordings], None, lambda: read(self.replica.finish(parts, recordings)))

    def answered(
        self, tokens: Int64[Tensor, "sequences length"], plan: Plan | None
    ) -> Float[Tensor, "sequences length vocabulary"]:
        """The logits of a text that comes up within a task of the last shard, such as a batch of a benchmark."""
        handed = None if self._upstream is None else self._upstream(ResultTasks.logits, tokens.cpu(), plan, _joined)
        logits: Tensor = self.relay(handed, ResultTasks.logits, tokens, plan, _joined)
        return logits

    def _finished(self, index: int, plan: Plan, *, lasting: bool = False) -> Weights:
        if self._solved:
            return {spec.linear: self._near(self._solved[spec.linear]) for spec in self.layout.blocks[index]}
        return self._cut(index, plan, self._final or self._ranking(index), lasting=lasting)

    @contextmanager
    def under(self, plan: Plan | None) -> Iterator[None]:
        """The whole model with the weights that `logits` gives it; one more copy of its linears while it lasts."""
        with ExitStack() as stack:
            if plan is not None:
                for index in self.replica.visited(self.blocks):
                    stack.enter_context(self.replica.swapped(self._finished(index, plan, lasting=True)))
            yield

    def mask(self, linear: Linear, plan: Plan) -> Bool[Tensor, "rows columns"]:
        """The final mask of one linear under `plan`, True where weights go."""
        if self._solved:
            return self._solved[linear] == 0
        return cut((self._final or self._ranking(linear.block))[linear], plan.removed[linear])

    def sees(self, folder: Path) -> None:
        """Raise BadInput when the output directory cannot be written from here."""
        if not os.access(folder, os.W_OK):
            raise BadInput(
                f"--output: the worker on {platform.node()} cannot write to {folder.parent}; name a directory on "
                "storage that all nodes share"
            )

    def write_ahead(self, part: Part, plan: Plan, target: Path) -> None:
        """Begin to `write` beside the tasks to come; see `written`. Of what is final now: it may change meanwhile.

        Not where blocks visit and are ranked when they do: there is one place for a visit.
        """
        if part.blocks.start in self.blocks and (not self.spec.streams or self._solved or self._final):
            now, beside = copy.copy(self), self._device_queue()
            self._ahead.begin(part.file, lambda stop: now._write(part, plan, target, stop, beside=beside))

    def _device_queue(self) -> torch.cuda.Stream | None:
        """Another queue of a GPU's work, which begins after what is in the one there is; None on a CPU."""
        if self.device.type != "cuda":
            return None
        queue = torch.cuda.Stream(self.device)
        queue.wait_stream(torch.cuda.current_stream(self.device))
        return queue

    def written(self, patience_s: float) -> dict[str, int | None]:
        """What `write` would return for each file that was begun ahead, None if it is not done after `patience_s`."""
        return self._ahead.found(patience_s)

    def write(self, part: Part, plan: Plan, target: Path) -> int:
        """Write one file of the final model under `plan` into `target`; the zeros among its linears' weights."""
        if part.blocks.start not in self.blocks:
            return cast(int, self._handed)
        return self._write(part, plan, target, threading.Event())

    def _write(
        self, part: Part, plan: Plan, target: Path, stop: threading.Event, *, beside: torch.cuda.Stream | None = None
    ) -> int:
        assert part.blocks.stop <= self.blocks.stop, "a part lies within a shard"
        try:
            with nullcontext() if beside is None else torch.cuda.stream(beside):
                return self._write_file(part, plan, target, stop)
        except OSError as error:  # a full disk, say
            raise OSError(f"{part.file}: {error}") from error

    def _write_file(self, part: Part, plan: Plan, target: Path, stop: threading.Event) -> int:
        keep_freed_memory()  # for one mask after the other
        source = self.replica.checkpoint
        written = new_part(source, part, target)
        put = write_weights if self._solved else zero_masked
        zeros, others = 0, dict.fromkeys(part.names)
        for block in part.blocks:
            if stop.is_set():
                raise Stopped
            values = {}
            for spec in self.layout.blocks[block]:
                value = self._solved[spec.linear] if self._solved else self.mask(spec.linear, plan)
                values[self.replica.name(spec)] = value.t() if is_transposed(self.replica.module(spec)) else value
            found = put(source, written, stored_tensors(self.replica.stream.model, values))
            zeros += sum(found.values())
            for name in found:
                del others[source.stored_name(name)]
        copy_tensors(source, written, others)
        return zeros

    def close(self) -> None:
        """End what goes on beside tasks."""
        self._ahead.end()


def _joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks))
