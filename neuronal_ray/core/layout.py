"""The prunable linears of a model: their names, shapes, and which linear reads which tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int64
from torch import Tensor

from neuronal_ray.core.stats import Statistic


@dataclass(frozen=True, order=True)
class Linear:
    """The name of one linear: block index and path inside the block, for example (3, "mlp.up_proj")."""

    block: int
    path: str

    def __str__(self) -> str:
        return f"block {self.block} {self.path}"


@dataclass(frozen=True, order=True)
class Group:
    """The linears of a block that read the same tensor; `index` counts the groups in order of execution."""

    block: int
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSpec:
    """Shape and wiring of one linear.

    `reads` is the group that the linear belongs to. `consumer` is the first group, in this block or the next, whose
    input depends on the linear's output; None where the output of the last block leaves the blocks.
    `sources` [rows, fan] lists, for each output row, the columns of the consumer's input that it determines
    (grouped-query keys and values fan out over the query heads of their group); None means that row i is column i.
    `sub_block` is "attention" for the linears around the mixing of tokens, "mlp" for the others. `expert` is the index
    of the expert that the linear belongs to, which sees only the tokens routed to it; None for ordinary linears.
    """

    linear: Linear
    rows: int
    columns: int
    reads: Group
    consumer: Group | None
    sources: Int64[Tensor, "rows fan"] | None
    sub_block: str = "mlp"
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def kind(self) -> str:
        """The linear's path without the number of an expert: equal for the same linear of all blocks and experts."""
        return ".".join(part for part in self.linear.path.split(".") if not part.isdecimal())

    def row_signal(self, signal: Tensor) -> Tensor:
        """Map the consumer's `signal` [columns of the consumer] to the rows of this linear, [rows]."""
        if self.sources is None:
            return signal
        return signal[self.sources].mean(dim=1)  # [rows, fan] -> [rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearData:
    """A linear as an allocation sees it: its dense weight and the statistic of its inputs, if any."""

    spec: LinearSpec
    weight: Float[Tensor, "rows columns"]
    inputs: Statistic | None


@dataclass(frozen=True, eq=False)
class Layout:
    """All prunable linears of a model, blocks in order and within a block in order of execution."""

    specs: tuple[LinearSpec, ...]

    def __iter__(self) -> Iterator[LinearSpec]:
        return iter(self.specs)

    def __getitem__(self, linear: Linear) -> LinearSpec:
        return self._by_linear[linear]

    @cached_property
    def _by_linear(self) -> dict[Linear, LinearSpec]:
        return {spec.linear: spec for spec in self.specs}

    @cached_property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return 1 + max(spec.linear.block for spec in self.specs)

    @cached_property
    def prunable(self) -> int:
        """Number of prunable weights, N."""
        return sum(spec.size for spec in self.specs)

    @cached_property
    def groups(self) -> dict[Group, list[LinearSpec]]:
        """The linears of each group, in order of execution."""
        groups: dict[Group, list[LinearSpec]] = {}
        for spec in self.specs:
            groups.setdefault(spec.reads, []).append(spec)
        return groups

    @cached_property
    def blocks(self) -> list[list[LinearSpec]]:
        """The linears of each block, in order of execution."""
        blocks: list[list[LinearSpec]] = [[] for _ in range(self.num_blocks)]
        for spec in self.specs:
            blocks[spec.linear.block].append(spec)
        return blocks

    @cached_property
    def routed(self) -> dict[Group, list[Group]]:
        """For each group of an expert, the groups in the same place of all experts of the block."""
        places: dict[tuple[int, int, int, int], list[Group]] = {}
        place_of: dict[Group, tuple[int, int, int, int]] = {}
        for block, specs in enumerate(self.blocks):
            seen: dict[int, int] = {}  # linears of each expert so far
            for spec in specs:
                if spec.expert is not None:
                    seen[spec.expert] = seen.get(spec.expert, -1) + 1
                    place_of[spec.reads] = (block, seen[spec.expert], spec.rows, spec.columns)
        for group, place in place_of.items():
            places.setdefault(place, []).append(group)
        return {group: places[place] for group, place in place_of.items()}

    @cached_property
    def feeds_experts(self) -> set[Group]:
        """The groups of experts whose input comes from outside the expert."""
        return set(self.routed) - {spec.consumer for spec in self if spec.expert is not None}

    def first_readers(self, block: int) -> dict[Group, LinearSpec]:
        """Return the first linear of each of the block's groups."""
        return {spec.reads: spec for spec in reversed(self.blocks[block])}
