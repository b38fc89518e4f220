"""Literal implementations, which share and save nothing, as the released codes do: what ours are compared with.

A candidate of NeuronAL's search: for every block dense weights on the sparse stream, one sequence at a time,
statistics in a hook on every linear; a new score, a new sort and a new mask for every linear; masked weights on the
same inputs. AlphaPruning: a singular value decomposition and a loop over cut-offs.
"""

import math

import torch
from torch import Tensor, nn

from neuronal_ray.core.plan import Plan
from neuronal_ray.models.blocks import Recording, set_weight, weight_of
from neuronal_ray.workers.worker import Worker


class _Hook:
    """Running statistics of one linear's inputs."""

    def __init__(self, *, all_statistics: bool) -> None:
        self.all_statistics = all_statistics
        self.count = 0
        self.square = torch.zeros(())
        self.mean, self.variance = torch.zeros(()), torch.zeros(())

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1]).t().float()  # [columns, tokens]
        kept, self.count = self.count / (self.count + 1), self.count + 1
        self.square = self.square * kept + torch.norm(inputs, p=2, dim=1) ** 2 / self.count
        if self.all_statistics:
            self.mean = self.mean * kept + inputs.sum(dim=1) / self.count
            self.variance = self.variance * kept + inputs.var(dim=1, unbiased=False) / self.count


def literal_candidate(worker: Worker, inputs: list[Recording], plan: Plan, *, all_statistics: bool) -> float:
    """Return the alignment score of `plan`; `inputs` are single sequences before the first block."""
    score = 0.0
    for index, linears in worker.replica.linears.items():
        dense, _ = _observed_pass(worker, index, inputs, all_statistics=all_statistics)
        own = {path: weight_of(module).clone() for path, module in linears.items()}
        for spec in worker.layout.blocks[index]:
            weight = own[spec.linear.path]
            metric = weight.abs().float() * dense[spec.linear.path].square.sqrt()
            order = torch.sort(metric, dim=-1, stable=True)[1]
            removed = plan.removed[spec.linear].to(weight.device)[:, None]
            goes = torch.arange(spec.columns, device=weight.device) < removed  # [rows, columns]
            pruned = weight.clone()
            pruned[torch.zeros_like(goes).scatter_(1, order, goes)] = 0
            set_weight(linears[spec.linear.path], pruned)
        sparse, inputs = _observed_pass(worker, index, inputs, all_statistics=all_statistics)
        for path, weight in own.items():
            set_weight(linears[path], weight)
            before, after = dense[path].square.sqrt(), sparse[path].square.sqrt()
            score += float(torch.norm(before / before.sum() - after / after.sum())) / len(before)
    return score


def _observed_pass(
    worker: Worker, index: int, inputs: list[Recording], *, all_statistics: bool
) -> tuple[dict[str, _Hook], list[Recording]]:
    hooks = {path: _Hook(all_statistics=all_statistics) for path in worker.replica.linears[index]}
    handles = [worker.replica.linears[index][path].register_forward_hook(hook) for path, hook in hooks.items()]
    outputs = [worker.replica.stream.block(index, recording) for recording in inputs]
    for handle in handles:
        handle.remove()
    return hooks, outputs


def literal_spectrum(weight: Tensor) -> Tensor:
    """Return the squared singular values, ascending, by a singular value decomposition (AlphaPruning)."""
    singular: Tensor = torch.linalg.svdvals(weight.float())
    return singular.square().flip(0)


def literal_tail_exponent(spectrum: Tensor, *, compat: bool) -> float:
    """Return AlphaPruning's exponent by a loop over cut-offs from 0.95 (compat: its log) to 1.5 times the peak."""
    count = len(spectrum)
    logs = spectrum.log10()
    histogram = torch.histogram(logs.float().cpu(), bins=100)
    peak = 10 ** float(histogram.bin_edges[int(histogram.hist.argmax())])
    lowest_cutoff = math.log10(0.95 * peak) if compat else 0.95 * peak
    best, exponent = float("inf"), float("nan")
    for index in range(count - 1):
        lowest = float(spectrum[index])
        if not lowest_cutoff <= lowest <= 1.5 * peak:
            continue
        tail = spectrum[index:]
        number = count - index
        alpha = 1 + number / float(tail.log().sum() - number * spectrum[index].log())
        model = 1 - (tail / lowest) ** (1 - alpha)
        steps = torch.arange(number, dtype=tail.dtype, device=tail.device) / number
        distance = float((model - steps).abs().max())
        if alpha > 1 and distance < best:
            best, exponent = distance, alpha
    return exponent
