"""Experts are distinguished from other lists, and one that received tokens is traced for all."""

import torch
from torch import nn

from neuronal_ray.models.routing import Place, Routing, find_places

TOKENS = 6


def feed_forward() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})


def block() -> nn.ModuleDict:
    """Make a block with attention, three experts and a list of two linears of different shapes."""
    return nn.ModuleDict(
        {
            "attention": nn.Linear(4, 4),
            "experts": nn.ModuleList(feed_forward() for _ in range(3)),
            "unlike": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)]),
        }
    )


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    return {path: linear for path, linear in module.named_modules() if isinstance(linear, nn.Linear)}


def routing(module: nn.Module, **seen: int) -> Routing:
    """Return the routing of a run in which the linears saw these numbers of tokens, in order; "__" is a dot."""
    named = {path.replace("__", "."): count for path, count in seen.items()}
    return Routing(module, linears_of(module), seen=named, tokens=TOKENS)


SOME = {"attention": 6, "experts__1__up": 2, "experts__1__down": 2, "experts__2__up": 4, "experts__2__down": 4}


def test_members_of_lists_that_are_alike_have_places() -> None:
    places = find_places(block(), linears_of(block()))
    assert places == {
        f"experts.{index}.{name}": Place("experts", index, name) for index in range(3) for name in ("up", "down")
    }
    assert all(place.path == path for path, place in places.items())


def test_the_outermost_list_counts() -> None:
    nested = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))})
    assert find_places(nested, linears_of(nested)) == {
        "experts.0.0": Place("experts", 0, "0"),
        "experts.1.0": Place("experts", 1, "0"),
    }


def test_a_list_of_linears_has_places_without_an_inside() -> None:
    lists = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert Place("experts", 1, "").path == "experts.1"
    assert find_places(lists, linears_of(lists))["experts.1"] == Place("experts", 1, "")


def test_all_experts_follow_where_the_first_one_ran() -> None:
    found = routing(block(), **SOME, unlike__0=6, unlike__1=6)
    assert found.order == [
        "attention",
        *(f"experts.{index}.{name}" for index in range(3) for name in ("up", "down")),
        "unlike.0",
        "unlike.1",
    ]


def test_the_expert_with_the_most_tokens_stands_for_all() -> None:
    found = routing(block(), **SOME)
    assert found.stand_in("experts.0.up") == found.stand_in("experts.1.up") == "experts.2.up"
    assert found.stand_in("attention") == "attention"
    assert found.expert("experts.0.down") == ("experts", 0)
    assert found.expert("attention") is None
    equals = routing(block(), **SOME | {"experts__1__up": 4, "experts__1__down": 4})
    assert equals.stand_in("experts.0.up") == "experts.1.up"


def test_a_reader_is_seen_in_ones_own_expert_or_in_the_first() -> None:
    found = routing(block(), **SOME)
    assert found.seen_from("experts.0.up", "experts.2.down") == "experts.0.down"
    assert found.seen_from("attention", "experts.1.up") == "experts.0.up"
    assert found.seen_from("experts.0.down", "attention") == "attention"
    assert found.enters("attention", "experts.1.up")
    assert not found.enters("experts.2.up", "experts.2.down")
    assert not found.enters("experts.2.down", "attention")


def test_lists_that_see_all_tokens_hold_no_experts() -> None:
    everywhere = {f"experts__{index}__{name}": TOKENS for index in range(3) for name in ("up", "down")}
    found = routing(block(), attention=TOKENS, **everywhere)
    assert found.expert("experts.0.up") is None
    assert found.order == ["attention", *(path.replace("__", ".") for path in everywhere)]


def test_experts_that_nothing_reached_are_missing() -> None:
    assert routing(block(), attention=TOKENS).order == ["attention"]
    empty = {f"experts__{index}__{name}": 0 for index in range(3) for name in ("up", "down")}
    assert routing(block(), attention=TOKENS, **empty).order == ["attention"]


def test_an_expert_that_ran_in_part_stands_for_none() -> None:
    found = routing(block(), attention=TOKENS, experts__0__up=5, experts__1__up=1, experts__1__down=1)
    assert found.stand_in("experts.2.down") == "experts.1.down"


def test_shapes_of_transposed_weights_count() -> None:
    module = block()
    module["experts"][0]["up"].weight = nn.Parameter(torch.zeros(4, 6))
    assert not [path for path in find_places(module, linears_of(module)) if path.startswith("experts")]
