"""Which linears of a block see only the tokens routed to them, and which one is traced in place of all of its kind?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from neuronal_ray.models.experts import experts_of


@dataclass(frozen=True)
class Place:
    """Where a linear stands in a list of experts: path of the list, index of the expert, path inside the expert."""

    experts: str
    expert: int
    inside: str

    @property
    def path(self) -> str:
        """The linear's path in the block."""
        return ".".join(part for part in (self.experts, str(self.expert), self.inside) if part)

    def of(self, expert: int) -> Self:
        """The same place in another expert."""
        return replace(self, expert=expert)


def find_places(block: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, Place]:
    """The places of those linears that lie in a list of modules or in split experts, all members alike in shape.

    A list may hold other things than experts: whether its members see a part of the tokens only is to be measured.
    """
    places: dict[str, Place] = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.ModuleList) and not experts_of(module):
            continue
        found = {}
        shapes: dict[int, set[tuple[str, torch.Size]]] = {}
        for path, linear in linears.items():
            if path.startswith(f"{name}.") and path not in places:  # the outermost list counts
                index, _, inside = path.removeprefix(f"{name}.").partition(".")
                found[path] = Place(name, int(index), inside)
                shapes.setdefault(int(index), set()).add((inside, linear.get_parameter("weight").shape))
        if len({frozenset(one) for one in shapes.values()}) == 1:
            places |= found
    return places


class Routing:
    """The experts of a block as one run met them; lists whose members all saw all tokens are none.

    Which experts receive anything depends on the tokens: of each list the one with the most tokens, the first of
    equals, is traced and stands for the others.
    """

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], *, seen: Mapping[str, int], tokens: int
    ) -> None:
        """`seen`: how many of the block's `tokens` each linear that ran received, in order of execution."""
        places = find_places(block, linears)
        routed = {place.experts for path, place in places.items() if seen.get(path, 0) < tokens}
        self._places = {path: place for path, place in places.items() if place.experts in routed}
        self._members: dict[str, dict[int, list[str]]] = {}
        for path, place in self._places.items():
            self._members.setdefault(place.experts, {}).setdefault(place.expert, []).append(path)
        self._traced: dict[str, int] = {}
        for experts, members in self._members.items():
            fewest = {expert: min(seen.get(path, 0) for path in paths) for expert, paths in sorted(members.items())}
            best = max(fewest, key=fewest.__getitem__)
            if fewest[best] > 0:
                self._traced[experts] = best
        self.order = self._order(list(seen))

    def _order(self, executed: list[str]) -> list[str]:
        """All linears as if every expert had been hit: where the first one ran, all run in order of index."""
        order: dict[str, None] = {}
        for path in executed:
            place = self._places.get(path)
            if place is None:
                order[path] = None
            elif place.experts in self._traced and path not in order:
                traced = set(self._members[place.experts][self._traced[place.experts]])
                inside = [self._places[other] for other in executed if other in traced]
                for expert in sorted(self._members[place.experts]):
                    order |= dict.fromkeys(other.of(expert).path for other in inside)
        return list(order)

    def expert(self, path: str) -> tuple[str, int] | None:
        """The expert that the linear belongs to: path of the list and index."""
        place = self._places.get(path)
        return None if place is None else (place.experts, place.expert)

    def stand_in(self, path: str) -> str:
        """The linear that is traced for this one: itself, or the traced expert's."""
        place = self._places.get(path)
        return path if place is None else place.of(self._traced[place.experts]).path

    def seen_from(self, path: str, reader: str) -> str:
        """The reader found for the stand-in of `path`: in its own expert or, from outside, in that which runs first."""
        own, place = self._places.get(path), self._places.get(reader)
        if place is None:
            return reader
        if own is not None and own.experts == place.experts:
            return place.of(own.expert).path
        return place.of(min(self._members[place.experts])).path

    def enters(self, path: str, reader: str) -> bool:
        """Return whether the output goes from outside into an expert: a router's does, by choosing the tokens."""
        own, place = self._places.get(path), self._places.get(reader)
        return place is not None and (own is None or own.experts != place.experts)
