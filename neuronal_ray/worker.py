"""One replica of the model on one device: it gathers statistics, ranks, tries plans and writes the result.

The weights stay dense for the worker's whole life. A sparse model is a view of them: the ranking cut by a plan,
put in place block by block while text passes through, and taken out again.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from neuronal_ray import plugins
from neuronal_ray.core.alignment import Trial, misalignment, total_misalignment
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.masks import apply_cut, cut, rank_rows
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import RunningNorm, SquareSum, Statistic
from neuronal_ray.models.blocks import Recording, Stream, find_linears, forwards, is_transposed, set_weight, weight_of
from neuronal_ray.models.checkpoint import load_model, open_checkpoint, zero_masked
from neuronal_ray.models.wiring import trace_layout
from neuronal_ray.timing import Stopwatch

Ranks = Mapping[Linear, Int[Tensor, "rows columns"]]
Statistics = Mapping[Group, Statistic]

CHUNK_TOKENS = 2048
"""Tokens that pass through a block at once. Part of the numerics: it does not depend on device or pool."""


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a worker needs to build its state, wherever it runs."""

    model_path: Path
    device: str
    dtype: str
    method: str
    method_settings: Mapping[str, object]
    threads: int | None
    trust_remote_code: bool
    profile: bool = False


def chunk_sequences(length: int) -> int:
    """Number of sequences of `length` tokens in one chunk."""
    return max(1, CHUNK_TOKENS // length)


class Worker:
    """See the module's docstring. Methods are called in the order: observe, rank, set_search_text, trial."""

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = torch.device(spec.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
        self.stopwatch = Stopwatch(self.device, synchronize=spec.profile)
        self.checkpoint = open_checkpoint(spec.model_path, trust_remote_code=spec.trust_remote_code)
        model = load_model(
            self.checkpoint,
            device=self.device,
            dtype=self._dtype(),
            trust_remote_code=spec.trust_remote_code,
        )
        self.stream = Stream(model)
        self.linears = [find_linears(block) for block in self.stream.blocks]
        self._check_weights()
        self.layout: Layout = trace_layout(self.stream)
        self._score = plugins.load("methods", spec.method).score
        self._ranks: dict[Linear, Tensor] = {}
        self._search: list[Recording] = []
        self._dense: Statistics = {}

    def _dtype(self) -> torch.dtype:
        if self.spec.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.spec.dtype]
        stored: torch.dtype | None = self.checkpoint.config.get_text_config().dtype
        return torch.float32 if stored is None or self.device.type == "cpu" else stored

    def describe(self) -> Layout:
        """The layout of the model."""
        return self.layout

    def device_name(self) -> str:
        """The name of the device, for the report."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"

    # -- the dense stream: one pass, one ranking ------------------------------------------------------------

    def observe(self, tokens: Int64[Tensor, "sequences length"]) -> Statistics:
        """Statistics of one chunk of calibration text on the dense model, on the host."""
        statistics = self._dense_statistics([self.stream.start(tokens.to(self.device))])
        return {group: statistic.to(torch.device("cpu")) for group, statistic in statistics.items()}

    def rank(self, statistics: Statistics | None) -> None:
        """Rank the rows of every linear once, by the method's score on the dense stream's statistics."""
        for index in range(self.layout.num_blocks):
            self._ranks |= self._rank_block(index, statistics)

    def set_search_text(self, tokens: Int64[Tensor, "sequences length"], *, chunk: int, with_reference: bool) -> None:
        """Keep the search sequences' embeddings and, if asked, their dense activation norms (A_D)."""
        self._search = [self.stream.start(part) for part in tokens.to(self.device).split(chunk)]
        self._dense = self._dense_statistics(self._search) if with_reference else {}

    def trial(self, plan: Plan) -> Trial:
        """Alignment of the model under `plan` with the dense model's own stream (Algorithm 1)."""
        recordings = self._search
        sparse: dict[Group, Statistic] = {}
        for index in range(self.layout.num_blocks):
            last = index == self.layout.num_blocks - 1
            with self._without_output(index) if last else nullcontext():
                recordings, observed = self._sparse_pass(index, recordings, plan, self._ranks, SquareSum)
            sparse |= observed
        return self._compare(self._dense, sparse)

    @contextmanager
    def _without_output(self, index: int) -> Iterator[None]:
        """Block `index` without the products of its last group: no later input of the block depends on them."""
        last = max(spec.reads for spec in self.layout.blocks[index])
        skipped = {id(self._module(spec)): spec.rows for spec in self.layout.groups[last]}

        def skip(_: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], skipped[id(module)])

        with forwards((self._module(spec) for spec in self.layout.groups[last]), skip):
            yield

    def _dense_statistics(self, recordings: list[Recording]) -> Statistics:
        statistics: dict[Group, Statistic] = {}
        with self.stopwatch.measure("dense pass"):
            for index in range(self.layout.num_blocks):
                recordings, observed = self._pass(index, recordings, SquareSum)
                statistics |= observed
        _check_finite(statistics)
        return statistics

    def _compare(self, dense: Statistics, sparse: Statistics, *, dead_is_infinite: bool = False) -> Trial:
        """Equation 2 over all linears, and the signed differences of the norms that the row step reads.

        The released code divides by the sum of the norms: an input that pruning has silenced makes its score NaN.
        """
        terms = []
        signals = {}
        for group, specs in self.layout.groups.items():
            ours, theirs = dense[group].norm, sparse[group].norm
            term = misalignment(ours, theirs)
            dead = dead_is_infinite and not bool(theirs.any())
            terms.append((torch.full_like(term, math.inf) if dead else term, len(specs)))
            signals[group] = (ours - theirs).cpu()
        total = total_misalignment(terms)
        return Trial(misalignment=total if math.isfinite(total) else math.inf, signals=signals)

    # -- the pruned stream: the released code's order, each block after its pruned predecessors ---------------

    def local_trial(self, plan: Plan) -> Trial:
        """Alignment block by block against dense weights on the sparse stream, ranking anew (released code)."""
        recordings = self._search
        dense: dict[Group, Statistic] = {}
        sparse: dict[Group, Statistic] = {}
        for index in range(self.layout.num_blocks):
            with self.stopwatch.measure("dense pass"):
                _, reference = self._pass(index, recordings, RunningNorm)
            ranks = self._rank_block(index, reference, lower_ties_first=plan.lower_ties_first)
            recordings, observed = self._sparse_pass(index, recordings, plan, ranks, RunningNorm)
            dense |= reference
            sparse |= observed
        return self._compare(dense, sparse, dead_is_infinite=True)

    def rank_on_pruned_stream(self, plan: Plan, tokens: Int64[Tensor, "sequences length"], *, chunk: int) -> None:
        """Rank block after block on the stream of the blocks already pruned by `plan` (Wanda's own order)."""
        recordings = [self.stream.start(part) for part in tokens.to(self.device).split(chunk)]
        statistic = RunningNorm if chunk == 1 else SquareSum
        for index in range(self.layout.num_blocks):
            with self.stopwatch.measure("dense pass"):
                _, observed = self._pass(index, recordings, statistic)
            _check_finite(observed)
            ranks = self._rank_block(index, observed, lower_ties_first=plan.lower_ties_first)
            recordings, _ = self._sparse_pass(index, recordings, plan, ranks, None)
            self._ranks |= ranks

    # -- the result --------------------------------------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "sequences length"], plan: Plan | None
    ) -> Iterator[Float[Tensor, "sequences length vocabulary"]]:
        """Logits chunk by chunk of the model under `plan`; None is the dense model."""
        parts = tokens.to(self.device).split(chunk_sequences(tokens.shape[1]))
        recordings = [self.stream.start(part) for part in parts]
        for index in range(self.layout.num_blocks):
            if plan is None:
                recordings, _ = self._pass(index, recordings, None)
            else:
                recordings, _ = self._sparse_pass(index, recordings, plan, self._ranks, None)
        for part, recording in zip(parts, recordings, strict=True):
            yield self.stream.finish(part, recording)

    def mask(self, linear: Linear, plan: Plan) -> Bool[Tensor, "rows columns"]:
        """The mask of one linear under `plan` by the current ranking, True where weights go."""
        return cut(self._ranks[linear], plan.removed[linear])

    def write(self, plan: Plan, target: Path) -> int:
        """Zero the weights that `plan` removes in the checkpoint copied to `target`; returns the zeros saved."""
        names = {
            f"{self.stream.blocks_name}.{spec.linear.block}.{spec.linear.path}.weight": spec for spec in self.layout
        }

        def mask_of(name: str) -> Tensor:
            spec = names[name]
            mask = self.mask(spec.linear, plan)
            return mask.t() if is_transposed(self._module(spec)) else mask

        return sum(zero_masked(self.checkpoint, target, names, mask_of).values())

    # -- one block -----------------------------------------------------------------------------------------------

    def _pass(
        self, index: int, recordings: Iterable[Recording], statistic: type[Statistic] | None
    ) -> tuple[list[Recording], dict[Group, Statistic]]:
        """Pass text through block `index` as it stands, gathering the input statistics of its groups."""
        observed: dict[Group, Statistic] = {}
        outputs = []
        for recording in recordings:
            with self._observing(index, statistic, observed, sequences=len(recording.hidden)):
                outputs.append(self.stream.block(index, recording))
        return outputs, observed

    def _sparse_pass(
        self,
        index: int,
        recordings: Iterable[Recording],
        plan: Plan,
        ranks: Ranks,
        statistic: type[Statistic] | None,
    ) -> tuple[list[Recording], dict[Group, Statistic]]:
        """`_pass` with block `index` pruned by `plan`; its dense weights are put back."""
        with self.stopwatch.measure("masks"):
            pruned = {
                spec.linear.path: apply_cut(self._weight(spec), ranks[spec.linear], plan.removed[spec.linear])
                for spec in self.layout.blocks[index]
            }
        with self.stopwatch.measure("sparse forwards"), _swapped(self.linears[index], pruned):
            return self._pass(index, recordings, statistic)

    @contextmanager
    def _observing(
        self, index: int, statistic: type[Statistic] | None, observed: dict[Group, Statistic], *, sequences: int
    ) -> Iterator[None]:
        """Hook the first linear of each group: linears that read one tensor share its statistic."""
        handles = []
        if statistic is not None:
            for group, first in self.layout.first_readers(index).items():
                module = self.linears[index][first.linear.path]
                handles.append(module.register_forward_pre_hook(self._observer(group, statistic, observed, sequences)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observer(
        self, group: Group, statistic: type[Statistic], observed: dict[Group, Statistic], sequences: int
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with self.stopwatch.measure("statistics"):
                inputs = args[0]
                seen = statistic.of(inputs.reshape(sequences, -1, inputs.shape[-1]))  # OPT joins sequences and tokens
                observed[group] = observed[group].merge(seen) if group in observed else seen

        return observe

    def _rank_block(
        self, index: int, statistics: Statistics | None, *, lower_ties_first: bool = True
    ) -> dict[Linear, Tensor]:
        with self.stopwatch.measure("ranking"):
            return {
                spec.linear: rank_rows(self._scored(spec, statistics), lower_ties_first=lower_ties_first)
                for spec in self.layout.blocks[index]
            }

    def _scored(self, spec: LinearSpec, statistics: Mapping[Group, Statistic] | None) -> Tensor:
        inputs = None if statistics is None else statistics[spec.reads].to(self.device)
        score: Tensor = self._score(self._weight(spec), inputs, **self.spec.method_settings)
        return score

    def _weight(self, spec: LinearSpec) -> Float[Tensor, "rows columns"]:
        return weight_of(self._module(spec))

    def _module(self, spec: LinearSpec) -> nn.Module:
        return self.linears[spec.linear.block][spec.linear.path]

    def _check_weights(self) -> None:
        for block, linears in enumerate(self.linears):
            for path, module in linears.items():
                if not bool(torch.isfinite(weight_of(module)).all()):
                    raise ValueError(f"--model: NaN or infinite weights in {Linear(block, path)}")


def _check_finite(statistics: Mapping[Group, Statistic]) -> None:
    """Raise ValueError naming the first block whose activations are not finite."""
    for group, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.norm).all()):
            raise ValueError(f"--model: NaN or infinite activations in block {group.block} of the dense model")


@contextmanager
def _swapped(linears: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Linears with other weights [rows, columns] in place of their own, which are put back on exit."""
    own = {path: weight_of(linears[path]) for path in weights}
    try:
        for path, weight in weights.items():
            set_weight(linears[path], weight)
        yield
    finally:
        for path, weight in own.items():
            set_weight(linears[path], weight)
