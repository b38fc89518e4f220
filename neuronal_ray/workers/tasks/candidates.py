"""How good is a candidate? The search text under plans, beside the dense model."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import RunningGram, RunningNorm, SquareSum
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.block_work import BlockWork
from neuronal_ray.workers.comparison import Comparison
from neuronal_ray.workers.replica import Statistics
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.spec import WorkerSpec


class CandidateTasks(BlockWork):
    """Tasks on the search text; `set_search_text` comes first."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._search: SearchText | None = None
        self._excerpts: dict[range, SearchText] = {}
        self._dense: Statistics = {}

    def set_search_text(
        self,
        tokens: Int64[Tensor, "sequences length"],
        reference: Statistics | None = None,
        *,
        chunk: int | None,
        with_reference: bool,
    ) -> None:
        """Keep the search sequences' embeddings and, if asked, what the dense model makes of them: the activation
        norms (A_D) and, in the last shard, the last hidden states; drops the levels.

        `reference`: the norms are known already and all that is wanted.
        """
        self._search, self._excerpts = SearchText(self.replica, tokens, chunk=chunk), {}
        self._levels = None
        self._dense = {}
        if reference is not None:
            self._dense = self._here(reference)
            return None
        (recordings,), _ = self._take([self._search.recordings], None)
        if with_reference:
            recordings, (self._dense,) = self._dense_statistics(recordings, (SquareSum,))
            self._search.keep_dense_end(recordings if self.is_last else ())
        return self._give([recordings], None, lambda: None)

    @property
    def _text(self) -> SearchText:
        assert self._search is not None, "set_search_text comes first"
        return self._search

    def trial(self, plan: Plan, *, divergence: bool = False) -> Trial:
        """Alignment of the model under `plan` with the dense model's own stream (Algorithm 1).

        With `divergence` also how far its next-token distributions are from the dense model's.
        """
        (found,) = self.trials([plan], divergence=divergence)
        return found

    def trials(self, plans: Sequence[Plan], *, divergence: bool = False) -> list[Trial]:
        """`trial` of several plans, which pass each block together: a block that visits the device comes once."""
        streams, comparisons = self._take([self._text.recordings] * len(plans), [Comparison() for _ in plans])
        for index in self.replica.visited(self.blocks):
            last = index == self.layout.num_blocks - 1 and not divergence
            with self.replica.without_output(index) if last else nullcontext():
                for number, (plan, comparison) in enumerate(zip(plans, comparisons, strict=True)):
                    weights = self._weights(index, plan)
                    streams[number], (observed,) = self.replica.run_with(index, streams[number], weights, (SquareSum,))
                    comparison.add(self.layout, index, self._dense, observed)
        return self._give(
            streams,
            comparisons,
            lambda: [
                comparison.trial(self._text.divergence(recordings, self.replica) if divergence else ())
                for comparison, recordings in zip(comparisons, streams, strict=True)
            ],
        )

    def goes_together(self) -> bool:
        """Whether candidates should come in groups: what each block costs is shared by those that pass it together."""
        return self.spec.streams

    def losses(self, plans: Sequence[Plan]) -> list[float]:
        """Mean cross-entropy of the search text under each plan, nats per predicted token; together, as in `trials`."""
        streams = self._together(plans)
        return self._give(streams, None, lambda: [self._loss(recordings) for recordings in streams])

    def divergences(self, plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        """Mean KL divergence of each search sequence's next-token distributions, dense from sparse, under each plan;
        nats a token.
        """
        streams = self._together(plans)
        return self._give(
            streams, None, lambda: [self._text.divergence(recordings, self.replica) for recordings in streams]
        )

    def _together(self, plans: Sequence[Plan]) -> list[list[Recording]]:
        """The search text after this shard under each plan."""
        streams, _ = self._take([self._text.recordings] * len(plans), None)
        return self._pass(streams, plans)

    def local_trial(self, plan: Plan) -> Trial:
        """Alignment block by block against dense weights on the sparse stream, ranking anew (released code)."""
        kind = RunningGram if self.pruner.solves else RunningNorm
        (recordings,), comparison = self._take([self._text.recordings], Comparison(dead_is_infinite=True))
        for index in self.replica.visited(self.blocks):
            with self.stopwatch.measure("dense pass"):
                _, (reference,) = self.replica.run(index, recordings, (kind,))
            weights, _ = self._pruned_block(index, plan, [reference])
            recordings, (observed,) = self.replica.run_with(index, recordings, weights, (kind,))
            comparison.add(self.layout, index, reference, observed)
        return self._give([recordings], comparison, comparison.trial)

    def _loss(self, recordings: list[Recording]) -> float:
        """Mean cross-entropy per predicted token of the search text, infinite on overflow."""
        total, count = 0.0, 0
        texts = (row for tokens in self._text.parts for row in tokens)
        rows = (row for logits in self.replica.finish(self._text.parts, recordings) for row in logits)
        for row, wanted in zip(rows, texts, strict=True):
            total += float(F.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum"))
            count += len(wanted) - 1
        return total / count if math.isfinite(total) else math.inf
