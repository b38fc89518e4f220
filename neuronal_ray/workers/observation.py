"""Statistics of the inputs of a block's linears, taken by hooks while text passes through."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from neuronal_ray.core.layout import Group, LinearSpec
from neuronal_ray.core.stats import Statistic
from neuronal_ray.workers.stopwatch import Stopwatch


@contextmanager
def observing(
    firsts: Sequence[tuple[LinearSpec, nn.Module]],
    kinds: tuple[type[Statistic], ...],
    observed: Sequence[dict[Group, Statistic]],
    *,
    sequences: int,
    stopwatch: Stopwatch,
) -> Iterator[None]:
    """Merge into `observed`, by kind, the statistics of what reaches each group's first linear.

    Linears that read one tensor share its statistic. `sequences` is the number of sequences of the text.
    """

    def observer(spec: LinearSpec) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        count = sequences if spec.expert is None else 1

        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with stopwatch.measure("statistics"):
                inputs = args[0].reshape(count, -1, args[0].shape[-1])  # OPT joins sequences and tokens
                for kind, known in zip(kinds, observed, strict=True):
                    seen = kind.of(inputs)
                    known[spec.reads] = known[spec.reads].merge(seen) if spec.reads in known else seen

        return observe

    handles = [module.register_forward_pre_hook(observer(spec)) for spec, module in firsts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
