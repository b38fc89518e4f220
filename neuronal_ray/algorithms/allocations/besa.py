"""BESA: rates of a block's linears, or of their rows, learned by gradients of the block's output error.

Xu et al., BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation, ICLR 2024,
section 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, Float64, Int, Int32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.layout import Linear
from neuronal_ray.core.plan import Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, BlockTask, Problem, Terms

_BISECTIONS = 100
_STEEPEST = 1e4  # slope of the logits: the rate is within 1e-4 of 0 or 1 there


def allocate(
    problem: Problem,
    *,
    per: str = "",
    candidates: int = 100,
    steps: int = 128,
    learning_rate: float = 0.02,
    penalty: float = 5.0,
) -> Allocation:
    """Return the rates that `learn_block` finds for every block, one per linear or one per row.

    `per` is "linear" or "row"; if empty, "row" where rows may differ. `candidates` is the number of intervals between
    candidate rates, `steps` the number of optimizer steps, each on one chunk of the search text, `penalty` the weight
    of the block's distance from the target.
    Differs: every block learns on the activations of the dense model, not of the pruned one, so that blocks can learn
    in parallel. Problem.plan makes up for what the penalty leaves of the budget.
    """
    check(problem, per=per, candidates=candidates, steps=steps, learning_rate=learning_rate, penalty=penalty)
    by_row = per == "row" or (not per and problem.rows_may_differ)
    rates = uniform_rates(problem.layout, lambda _: problem.target)
    uniform = problem.plan(rates, rows_adapted=False)
    if not 0 < problem.target < 1:  # there is nothing to learn, and the penalty divides by the target
        return Allocation(plan=uniform, rates=rates, baselines={"uniform": uniform})
    learn = partial(
        learn_block,
        target=problem.target,
        by_row=by_row,
        candidates=candidates,
        steps=steps,
        learning_rate=learning_rate,
        penalty=penalty,
    )
    learned: dict[Linear, Float64[Tensor, " rows"]] = {}
    for block in problem.probe.learn(learn):
        learned |= block
    plan = problem.plan(learned, rows_adapted=by_row)
    return Allocation(plan=plan, rates=learned, baselines={"uniform": uniform})


def check(
    terms: Terms,
    *,
    per: str = "",
    candidates: int = 100,
    steps: int = 128,
    learning_rate: float = 0.02,
    penalty: float = 5.0,
) -> None:
    """Raise BadInput for settings out of range, and for rates of rows where rows cannot differ."""
    if per not in ("", "linear", "row"):
        raise BadInput(f"--set allocation.per: expected linear or row, got {per}")
    if per == "row" and terms.rows_fixed_by:
        raise BadInput(f"--set allocation.per: {terms.rows_fixed_by}; use allocation.per=linear")
    if candidates < 1:
        raise BadInput(f"--set allocation.candidates: expected 1 or more, got {candidates}")
    if steps < 1:
        raise BadInput(f"--set allocation.steps: expected 1 or more, got {steps}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise BadInput(f"--set allocation.learning_rate: expected a number above 0, got {learning_rate}")
    if not (penalty >= 0 and math.isfinite(penalty)):
        raise BadInput(f"--set allocation.penalty: expected a number from 0 on, got {penalty}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """The learned shares of the candidate rates of one linear: one row of `logits` for the linear or for each row.

    `table` [candidates, columns] is 1 where a weight of that rank goes under the candidate.
    """

    logits: Float32[Tensor, "groups candidates"]
    table: Float32[Tensor, "candidates columns"]
    candidates: Float32[Tensor, " candidates"]
    size: int

    @property
    def shares(self) -> Float32[Tensor, "groups candidates"]:
        """The shares beta_d, which sum to 1 over the candidates."""
        return self.logits.softmax(dim=1)

    @property
    def rates(self) -> Float32[Tensor, " groups"]:
        """The differentiable rate of each group: the sum over d of beta_d p_d."""
        return self.shares @ self.candidates


def learn_block(
    task: BlockTask, *, target: float, by_row: bool, candidates: int, steps: int, learning_rate: float, penalty: float
) -> Rates:
    """Return the rates, float64 [rows] on the host, of the block's linears after `steps` steps of Adam.

    All rates start at the target. Deterministic: step t reads chunk t modulo the number of chunks. The weights are
    frozen.
    Differs: Adam, where the released code has Prodigy (one more dependency); a plain softmax as in the paper, where
    the released code applies a sigmoid to the logits first, which keeps every rate between 0.37 and 0.63.
    """
    mixtures = {
        spec.linear: _mixture(
            target,
            groups=spec.rows if by_row else 1,
            candidates=candidates,
            columns=spec.columns,
            size=spec.size,
            device=task.weights[spec.linear].device,
        )
        for spec in task.specs
    }
    optimizer = torch.optim.Adam([mixture.logits for mixture in mixtures.values()], lr=learning_rate)
    for step in range(steps):
        with torch.enable_grad():
            loss = _surrogate(task, step % task.num_texts, mixtures, target=target, penalty=penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rates = {}
    for spec in task.specs:
        learned = mixtures[spec.linear].rates.detach().double().cpu()
        rates[spec.linear] = learned.expand(spec.rows).clone()  # [groups] -> [rows]
    return rates


def _mixture(target: float, *, groups: int, candidates: int, columns: int, size: int, device: torch.device) -> Mixture:
    """Return all groups at the target rate; candidate d = 0, 1, .. removes floor(columns * d / candidates) weights."""
    steps = torch.arange(candidates + 1, device=device)
    counts = steps * columns // candidates
    table = torch.arange(columns, device=device) < counts[:, None]  # [candidates + 1, columns]
    logits = initial_logits(target, candidates).float().to(device).repeat(groups, 1)  # [groups, candidates + 1]
    return Mixture(
        logits=logits.requires_grad_(), table=table.float(), candidates=steps.float() / candidates, size=size
    )


def initial_logits(target: float, candidates: int) -> Float64[Tensor, " candidates"]:
    """Return logits linear in the rate, whose mean rate is the target (0 < target < 1) at the greatest entropy.

    Differs: the released code starts from equal shares, a rate of 0.5, whatever the target is.
    """
    rates = torch.arange(candidates + 1, dtype=torch.float64) / candidates
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(_BISECTIONS):
        slope = (low + high) / 2
        mean = float((slope * rates).softmax(dim=0) @ rates)
        low, high = (slope, high) if mean < target else (low, slope)
    return slope * rates


def _surrogate(
    task: BlockTask, text: int, mixtures: Mapping[Linear, Mixture], *, target: float, penalty: float
) -> Float32[Tensor, ""]:
    """Return a scalar whose gradient in the logits is the straight-through gradient of the loss.

    The loss is the block's error under the hard masks of the current rates plus
    penalty * ((rate of the block - target) / target)^2. In the backward pass the factor of a weight is one minus its
    probability to go, which is the sum of the shares of the candidates under which the weight goes.
    """
    rates = {linear: mixture.rates for linear, mixture in mixtures.items()}
    with torch.no_grad():
        cuts = {
            linear: zero_lowest(weight, task.ranks[linear], hard_counts(rates[linear], weight))
            for linear, weight in task.weights.items()
        }
    error = output_error(task.dense_output(text), task.output(text, {k: v.requires_grad_() for k, v in cuts.items()}))
    if not bool(error.isfinite()):
        raise BadInput(
            f"--allocation besa: the output error of block {task.specs[0].linear.block} is {float(error.detach())}, "
            "expected a finite number"
        )
    # An expert that no token of the text reached has no gradient.
    gradients = torch.autograd.grad(error, list(cuts.values()), allow_unused=True, materialize_grads=True)
    size = sum(mixture.size for mixture in mixtures.values())
    mean = torch.stack([rate.mean() * (mixtures[linear].size / size) for linear, rate in rates.items()]).sum()
    total = penalty * ((mean - target) / target).square()
    for linear, gradient in zip(cuts, gradients, strict=True):
        mixture = mixtures[linear]
        by_rank = influence_by_rank(gradient, task.weights[linear], task.ranks[linear])  # [rows, columns]
        if len(mixture.logits) == 1:
            by_rank = by_rank.sum(dim=0, keepdim=True)  # [1, columns]
        total = total - (mixture.shares * (by_rank @ mixture.table.t())).sum()
    return total


def hard_counts(rates: Float32[Tensor, " groups"], weight: Float[Tensor, "rows columns"]) -> Int32[Tensor, " rows"]:
    """Return how many weights each row loses at the rate of its group, rounded half to even."""
    rows, columns = weight.shape
    return (rates * columns).round().int().expand(rows).contiguous()  # [groups] -> [rows]


def influence_by_rank(
    gradient: Float[Tensor, "rows columns"], weight: Float[Tensor, "rows columns"], ranks: Int[Tensor, "rows columns"]
) -> Float32[Tensor, "rows columns"]:
    """Return the gradient in each weight's factor in the order of the ranks; a permutation, hence deterministic."""
    influence = gradient.float() * weight.float()
    return torch.empty_like(influence).scatter_(1, ranks.long(), influence)


def output_error(
    dense: Float[Tensor, "sequences tokens features"], sparse: Float[Tensor, "sequences tokens features"]
) -> Float32[Tensor, ""]:
    """Return the mean over features of a feature's squared error over its squared norm, both summed over the tokens.

    A feature that is zero everywhere counts with its squared error.
    """
    dense = dense.float()
    norms = dense.square().sum(dim=(0, 1))  # [sequences, tokens, features] -> [features]
    errors = (sparse.float() - dense).square().sum(dim=(0, 1))
    return (errors / norms.where(norms > 0, 1.0)).mean()


ALLOCATION = Allocator(allocate=allocate, check=check)
