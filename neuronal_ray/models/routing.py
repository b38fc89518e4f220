"""Experts of a block: the linears that see only the tokens routed to them, and the one traced for all experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from neuronal_ray.models.experts import experts_of


@dataclass(frozen=True)
class Place:
    """The position of a linear in a list of experts: path of the list, index of the expert, path inside the expert."""

    experts: str
    expert: int
    inside: str

    @property
    def path(self) -> str:
        """The linear's path in the block."""
        return ".".join(part for part in (self.experts, str(self.expert), self.inside) if part)

    def of(self, expert: int) -> Self:
        """Return the same place in another expert."""
        return replace(self, expert=expert)


def find_places(block: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Return the places of linears in lists of modules or split experts whose members all have the same shapes.

    Such a list need not hold experts: whether its members see only some of the tokens remains to be measured.
    """
    places: dict[str, Place] = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.ModuleList) and not experts_of(module):
            continue
        of_list = {}
        shapes: dict[int, set[tuple[str, torch.Size]]] = {}
        for path, linear in linears.items():
            if path.startswith(f"{name}.") and path not in places:  # the outermost list counts
                index, _, inside = path.removeprefix(f"{name}.").partition(".")
                of_list[path] = Place(name, int(index), inside)
                shapes.setdefault(int(index), set()).add((inside, linear.get_parameter("weight").shape))
        if len({frozenset(member) for member in shapes.values()}) == 1:
            places |= of_list
    return places


class Routing:
    """The experts of a block, from one run; lists whose members all saw all tokens hold no experts.

    Which experts receive tokens depends on the text. In each list the expert with the most tokens, the first of equals,
    is traced in place of the others.
    """

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], *, seen: Mapping[str, int], tokens: int
    ) -> None:
        """Evaluate a run; `seen` holds how many of the block's `tokens` each linear received, in order of execution."""
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
        """Return the order of execution if every expert received tokens: at the first, all run in order of index."""
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
        """Return the expert that the linear belongs to, as path of the list and index; None for other linears."""
        place = self._places.get(path)
        return None if place is None else (place.experts, place.expert)

    def stand_in(self, path: str) -> str:
        """Return the linear that is traced in place of this one: itself, or the traced expert's."""
        place = self._places.get(path)
        return path if place is None else place.of(self._traced[place.experts]).path

    def seen_from(self, path: str, reader: str) -> str:
        """Translate the reader of the stand-in of `path` to `path`.

        The result lies in the expert of `path` or, for a linear outside, in the expert that runs first.
        """
        own, place = self._places.get(path), self._places.get(reader)
        if place is None:
            return reader
        if own is not None and own.experts == place.experts:
            return place.of(own.expert).path
        return place.of(min(self._members[place.experts])).path

    def enters(self, path: str, reader: str) -> bool:
        """Return whether the output goes from outside into an expert, as a router's does by choosing the tokens."""
        own, place = self._places.get(path), self._places.get(reader)
        return place is not None and (own is None or own.experts != place.experts)
