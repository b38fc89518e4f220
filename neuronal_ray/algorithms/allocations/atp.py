"""ATP: block rates in arithmetic progression, whose slope is selected by the pruned model's loss.

Huang et al., Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective, ICML 2025.
"""

import logging
import math

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.plan import Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step, Terms
from neuronal_ray.core.spread import block_schedule

logger = logging.getLogger(__name__)


def allocate(problem: Problem, *, step: float = 0.002, max_candidates: int = 32) -> Allocation:
    """Return the progression of least loss among the slopes step, 2 step, ... that keep all rates in [0, 1].

    Tie rule: of equal losses the gentler slope wins; a loss that is not finite wins only if no loss is finite. Where no
    slope fits (one block, or a target next to 0 or 1) the plan is uniform. The bound of the slopes is the source's own:
    at the steepest, from a target of 0.5 on, the last block loses all weights.
    Differs: the loss is that of the calibration text; the released script takes the perplexity of WikiText-2's test
    set. At most `max_candidates` slopes are tried (see `slopes`).
    """
    check(problem, step=step, max_candidates=max_candidates)
    uniform = uniform_rates(problem.layout, lambda _: problem.target)
    baselines = {"uniform": problem.plan(uniform, rows_adapted=False)}
    num_blocks = problem.layout.num_blocks
    betas = slopes(num_blocks, target=problem.target, step=step, most=max_candidates)
    if not betas:
        logger.warning("no slope of %g or more fits %d blocks at %g: uniform", step, num_blocks, problem.target)
        return Allocation(plan=baselines["uniform"], rates=uniform, baselines=baselines)
    candidates = [block_rates(problem, beta) for beta in betas]
    plans = [problem.plan(rates, rows_adapted=False) for rates in candidates]
    losses = problem.probe.losses("slope", betas, plans)
    best = min(range(len(betas)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
    record = Step(name="slope", lambdas=tuple(betas), scores=tuple(losses), selected=betas[best])
    return Allocation(plan=plans[best], rates=candidates[best], steps=(record,), baselines=baselines)


def check(terms: Terms, *, step: float = 0.002, max_candidates: int = 32) -> None:
    """Raise BadInput for settings out of range."""
    if not 0 < step <= 1:
        raise BadInput(f"--set allocation.step: {step} is not in (0, 1]")
    if max_candidates < 1:
        raise BadInput(f"--set allocation.max_candidates: {max_candidates} is not at least 1")


def slopes(num_blocks: int, *, target: float, step: float, most: int) -> list[float]:
    """Return the multiples of `step` up to min(2 s, 2 (1 - s)) / (B - 1), ascending; none for one block.

    Differs: of more than `most` multiples, `most` evenly spaced ones are kept, the last included (models of few blocks
    have steep slopes to try: 60 multiples of 0.002 at 6 blocks and 0.7, 9 at 32 blocks).
    """
    if num_blocks == 1:
        return []
    widest = min(2 * target, 2 * (1 - target)) / (num_blocks - 1)
    count = math.floor(widest / step + 1e-9)  # a bound that is a multiple stays one in spite of rounding
    tried = min(count, most)
    return [round(step * (index * count // tried), 12) for index in range(1, tried + 1)]


def block_rates(problem: Problem, beta: float) -> Rates:
    """Return s_b = s - beta (B - 1) / 2 + beta b; the first block is the least sparse."""
    num_blocks = problem.layout.num_blocks
    by_block = block_schedule("linear", num_blocks, lam=beta * (num_blocks - 1) / 2, mean=problem.target).tolist()
    return uniform_rates(problem.layout, lambda block: by_block[block])


ALLOCATION = Allocator(allocate=allocate, check=check)
