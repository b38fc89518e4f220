"""Does every method run with every allocation, row step, refinement and pattern, on several families, to the weight?"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import cpu_spec

from neuronal_ray.algorithms import registry
from neuronal_ray.cli.options import parse_config
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune.compose import compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.pipeline import allocate
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.tasks.final_model import logits, mask, settle
from neuronal_ray.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "mistral", "opt", "phi", "mixtral")
SAMPLES, SEARCHED, LENGTH = 6, 2, 16
QUICK = {
    "neuronal": ["--block-lambdas", "0.05,0.2", "--row-lambdas", "0,0.1"],
    "adaptive": ["--search-budget", "24", "--block-lambdas", "0.05,0.2", "--row-lambdas", "0,0.1"],
    "atp": ["--set", "allocation.max_candidates=3"],
    "besa": ["--set", "allocation.steps=2"],
}
"""Fewer candidates than the default; the trials are the same."""


def combinations() -> Iterator[str]:
    """Every method with every allocation; every other choice with a method that ranks and one that solves."""
    for method in registry.names("methods"):
        for allocation in registry.names("allocations"):
            yield f"--method {method} --allocation {allocation}"
    for method in ("magnitude", "wanda", "multiflow", "sparsegpt"):
        for allocation in ("uniform", "neuronal", "owl"):
            yield f"--method {method} --allocation {allocation} --refinement dsnot"
    for pattern in ("2:4", "4:8", "3:8"):
        for method in registry.names("methods"):
            yield f"--method {method} --pattern {pattern}"
    for allocation in registry.names("allocations"):
        yield f"--method wanda --allocation {allocation} --pattern n:8"
    for method in registry.names("methods"):
        yield f"--method {method} --allocation neuronal --pattern n:8"
    for allocation in ("uniform", "owl", "neuronal", "adaptive"):
        for row_step in ("neuronal", "trim"):
            yield f"--method wanda --allocation {allocation} --row-step {row_step}"
    yield "--method wanda --pattern 2:4 --refinement dsnot --refined-parts all"
    yield "--method wanda --pattern n:8 --refinement dsnot --refined-parts mlp"
    yield "--method wanda --allocation owl --row-step trim --refinement dsnot"
    for schedule in ("exp", "log"):
        yield f"--allocation neuronal --schedule {schedule}"
    yield "--allocation neuronal --lambda-search continuous"
    yield "--mode paper --criterion kl --allocation neuronal"
    yield "--mode best --allocation neuronal --criterion alignment"
    for method in ("wanda", "sparsegpt", "alps", "magnitude"):
        yield f"--method {method} --score-stream {'dense' if method in ('sparsegpt', 'alps') else 'pruned'}"
    yield "--method wanda --refinement dsnot --score-stream pruned"
    yield "--method sparsegpt --refinement dsnot --score-stream pruned"
    yield "--method alps --pattern 2:4 --score-stream dense"


AUTHORS = [
    f"--mode authors --method {method} --allocation {allocation}"
    for method in ("magnitude", "wanda", "multiflow", "sparsegpt")
    for allocation in ("uniform", "owl", "neuronal")
] + [f"--mode authors --method {method} --allocation uniform --refinement dsnot" for method in ("wanda", "sparsegpt")]


class Pruned:
    """A model pruned by a command line's choices, in process."""

    def __init__(self, path: Path, arguments: str) -> None:
        argv = ["--model", "m", "--output", "out", *arguments.split()]
        argv += QUICK.get(argv[argv.index("--allocation") + 1] if "--allocation" in argv else "adaptive", [])
        argv += ["--search-samples", str(SEARCHED), "--calibration-samples", str(SAMPLES)]
        if "alps" in argv:
            argv += ["--set", "method.iterations=6"]
        config = parse_config(PruneConfig, argv, prog="test", description="")
        self.composition = compose(config)
        spec = cpu_spec(path, self.composition.pruner, threads=None)
        pool = InProcessPool(spec)
        self.worker: Worker = pool.first(lambda worker: worker)
        text = torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        progress = Progress()
        session = Session(pool)
        session.hold(self.composition, text, progress, samples=config.search_samples)
        search = session.search(self.composition, text, progress, samples=config.search_samples, mode=config.mode)
        allocation = allocate(config, self.composition, self.worker.layout, search)
        self.plan: Plan = allocation.plan
        walk = Walk(pruned=self.composition.pruned_stream, released=self.composition.released)
        pool.each(settle, self.plan, text, walk)
        (self.logits,) = logits(self.worker, text, self.plan, lambda _, chunks: chunks)

    def removed(self) -> dict[str, int]:
        return {str(spec.linear): int(mask(self.worker, spec.linear, self.plan).sum()) for spec in self.worker.layout}


def cases() -> Iterator[tuple[str, str]]:
    """Every combination on one of the families, which take turns."""
    for number, arguments in enumerate(dict.fromkeys(combinations())):
        yield FAMILIES[number % len(FAMILIES)], arguments


@pytest.mark.parametrize(("family", "arguments"), list(cases()))
def test_a_combination_removes_what_was_asked(
    family: str, arguments: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    pruned = Pruned(checkpoint_dir(family), arguments)
    layout, composition = pruned.worker.layout, pruned.composition
    assert pruned.logits.isfinite().all()
    wanted = {str(spec.linear): int(pruned.plan.removed[spec.linear].sum()) for spec in layout}
    if composition.pruner.solves and family == "opt":
        # Its ReLU leaves inputs dead on so short a text, and a solver zeroes all weights of a dead input.
        assert all(found >= wanted[linear] for linear, found in pruned.removed().items())
    else:
        assert pruned.removed() == wanted
    pattern = composition.pruner.pattern
    if pattern is None:
        assert sum(wanted.values()) == round(composition.target * layout.prunable)
        return
    for spec in layout:
        groups = mask(pruned.worker, spec.linear, pruned.plan).unflatten(1, (-1, pattern.group)).sum(dim=2)
        least = wanted[str(spec.linear)] * pattern.group // spec.size
        assert (groups >= least).all(), spec.linear  # and no more, by the counts above
        assert pattern.kept is None or least == pattern.group - pattern.kept, spec.linear
    step = max(spec.size for spec in layout) // pattern.group  # of the largest linear
    assert abs(sum(wanted.values()) - composition.target * layout.prunable) <= step / 2


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("arguments", AUTHORS)
def test_the_released_code_s_choices_run(family: str, arguments: str, checkpoint_dir: Callable[[str], Path]) -> None:
    pruned = Pruned(checkpoint_dir(family), arguments)
    assert pruned.logits.isfinite().all()
    if not pruned.composition.pruner.solves:  # the released solver counts by slabs
        assert sum(pruned.removed().values()) == pruned.plan.total
    assert sum(pruned.removed().values()) / pruned.worker.layout.prunable == pytest.approx(0.7, abs=0.04)
