"""All cases, and samples of them."""

import random
from collections.abc import Sequence

from bad_inputs import flags, model_files, paths, results, tensors, texts, toml_files
from bad_inputs.case import Case

_SOURCES = (model_files, tensors, flags, toml_files, texts, paths, results)


def all_cases() -> list[Case]:
    """Every case, each name once."""
    found: dict[str, Case] = {}
    for source in _SOURCES:
        for case in source.cases():
            if found.setdefault(case.name, case) is not case:
                raise ValueError(f"two cases are called {case.name!r}")
    return list(found.values())


def sample(cases: Sequence[Case], count: int, *, seed: int) -> list[Case]:
    """Draw cases, in their order."""
    chosen = sorted(random.Random(seed).sample(range(len(cases)), min(count, len(cases))))
    return [cases[place] for place in chosen]
