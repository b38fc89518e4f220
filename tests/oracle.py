"""What does NeuronAL compute, written out literally and slowly from the paper and the specification?

It shares no code with the package and is over 300 lines because it spells every rule out again. Sequences go
through the model one at a time. A mask is True where weights are removed; a rate is a fraction removed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

Key = tuple[int, str]  # block index, path of the linear inside its block
Pick = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]  # `cut` or `cut_later`


@dataclass(frozen=True)
class OracleResult:
    """What one run chose; scores are by lambda in the order of evaluation, none for a step not taken."""

    block_scores: dict[float, float]
    row_scores: dict[float, float]
    lambda_block: float | None
    lambda_row: float | None
    masks: dict[Key, torch.Tensor]


@dataclass(frozen=True)
class Consumer:
    """The linear, `ahead` blocks later and at `path` there, whose input the rows of another linear feed."""

    ahead: int
    path: str


@dataclass(frozen=True)
class Family:
    """Where a family keeps its blocks, and for each linear of a block its consumer.

    `paper` lists the linears in the order the block runs them, `authors` in the released code's order.
    """

    blocks: str
    paper: dict[str, Consumer]
    authors: dict[str, Consumer]


LLAMA_CONSUMERS = {
    "self_attn.q_proj": Consumer(0, "self_attn.o_proj"),
    "self_attn.k_proj": Consumer(0, "self_attn.o_proj"),
    "self_attn.v_proj": Consumer(0, "self_attn.o_proj"),
    "self_attn.o_proj": Consumer(0, "mlp.gate_proj"),
    "mlp.gate_proj": Consumer(0, "mlp.down_proj"),
    "mlp.up_proj": Consumer(0, "mlp.down_proj"),
    "mlp.down_proj": Consumer(1, "self_attn.q_proj"),
}

FAMILIES = {
    "llama": Family("model.layers", LLAMA_CONSUMERS, LLAMA_CONSUMERS),
    "mistral": Family("model.layers", LLAMA_CONSUMERS, LLAMA_CONSUMERS),
    "opt": Family(
        "model.decoder.layers",
        {
            "self_attn.q_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.k_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.v_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.out_proj": Consumer(0, "fc1"),
            "fc1": Consumer(0, "fc2"),
            "fc2": Consumer(1, "self_attn.q_proj"),
        },
        {
            "self_attn.k_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.v_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.q_proj": Consumer(0, "self_attn.out_proj"),
            "self_attn.out_proj": Consumer(0, "fc1"),
            "fc1": Consumer(0, "fc2"),
            "fc2": Consumer(1, "self_attn.k_proj"),
        },
    ),
    "phi": Family(
        "model.layers",
        {
            "self_attn.q_proj": Consumer(0, "self_attn.dense"),
            "self_attn.k_proj": Consumer(0, "self_attn.dense"),
            "self_attn.v_proj": Consumer(0, "self_attn.dense"),
            "self_attn.dense": Consumer(1, "self_attn.q_proj"),
            "mlp.fc1": Consumer(0, "mlp.fc2"),
            "mlp.fc2": Consumer(1, "self_attn.q_proj"),
        },
        {
            "self_attn.q_proj": Consumer(0, "self_attn.dense"),
            "self_attn.k_proj": Consumer(0, "self_attn.dense"),
            "self_attn.v_proj": Consumer(0, "self_attn.dense"),
            "self_attn.dense": Consumer(0, "mlp.fc1"),
            "mlp.fc1": Consumer(0, "mlp.fc2"),
            "mlp.fc2": Consumer(1, "self_attn.q_proj"),
        },
    ),
}

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Carried:
    """One sequence on its way: hidden states [1, seqlen, hidden] and the blocks' other arguments."""

    hidden: torch.Tensor
    arguments: dict


class Model:
    """A transformers model with its blocks and prunable linears by key; block order, then execution order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = model.config
        self.family = FAMILIES[model.config.model_type]
        self.blocks = list(model.get_submodule(self.family.blocks))
        self.linears: dict[Key, nn.Linear] = {}
        for index, block in enumerate(self.blocks):
            for path in self.family.paper:
                self.linears[index, path] = block.get_submodule(path)
            num_linears = sum(isinstance(module, nn.Linear) for module in block.modules())
            assert num_linears == len(self.family.paper), "the table must name every linear of a block"

    def authors_keys(self, index: int) -> list[Key]:
        """The linears of one block in the released code's order."""
        return [(index, path) for path in self.family.authors]

    def query_heads(self) -> int:
        return self.config.num_attention_heads

    def key_value_heads(self) -> int:
        if self.config.model_type == "opt":
            return self.config.num_attention_heads
        return self.config.num_key_value_heads

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Evaluation mode and no gradients inside; weights and mode as before afterwards."""
        before = {key: linear.weight.detach().clone() for key, linear in self.linears.items()}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for key, linear in self.linears.items():
                    linear.weight.copy_(before[key])
            self.model.train(training)

    @contextmanager
    def observed(self, observe: Callable[[Key, torch.Tensor], None], keys: Sequence[Key]) -> Iterator[None]:
        """Inside, `observe` gets each input [tokens, in] of each linear of `keys`, once a sequence."""

        def hook_of(key: Key) -> Callable:
            def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                observe(key, inputs[0].reshape(-1, inputs[0].shape[-1]))

            return hook

        handles = [self.linears[key].register_forward_hook(hook_of(key)) for key in keys]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def first_carried(self, tokens: torch.Tensor) -> list[Carried]:
        """What block 0 is given for each row of `tokens` [sequences, seqlen]."""
        carried: list[Carried] = []

        def hook(module: nn.Module, inputs: tuple, arguments: dict) -> None:
            rest = {name: value for name, value in arguments.items() if name != "hidden_states"}
            carried.append(Carried(inputs[0] if inputs else arguments["hidden_states"], rest))

        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with self.unchanged():
                for row in tokens:
                    self.model(row[None], use_cache=False)
        finally:
            handle.remove()
        return carried

    def through_block(self, index: int, carried: list[Carried]) -> list[Carried]:
        """What comes out of block `index`, one sequence at a time."""
        after = []
        for one in carried:
            output = self.blocks[index](one.hidden, **one.arguments)
            after.append(Carried(output[0] if isinstance(output, tuple) else output, one.arguments))
        return after


def cut(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The mask that removes the counts[i] lowest of row i of `scores` [out, in], of ties the lower column."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        order = torch.sort(scores[row], stable=True).indices  # [in]
        mask[row, order[:count]] = True
    return mask


def cut_later(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """As `cut`, but of ties the higher column goes first: the released row step sorts for what it keeps."""
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        order = torch.sort(scores[row], descending=True, stable=True).indices  # [in]
        mask[row, order[: len(order) - count]] = False
    return mask


def method_score(weight: torch.Tensor, norms: torch.Tensor, method: str) -> torch.Tensor:
    """The score [out, in] in float32 of `weight` [out, in] with the input norms [in].

    MULTIFLOW's factor of the row is left out: it is the same for all weights that are compared.
    """
    if method == "magnitude":
        return weight.abs()
    weighted = weight.abs() * norms.float()[None, :]
    if method == "wanda":
        return weighted
    assert method == "multiflow", method
    return weight.abs() * weighted.mean(dim=0)[None, :]


# The mode "paper"


class SquareSums:
    """Sums of squares by linear and feature in float64."""

    def __init__(self) -> None:
        self.sums: dict[Key, torch.Tensor] = {}

    def __call__(self, key: Key, inputs: torch.Tensor) -> None:
        squares = inputs.double().square().sum(dim=0)  # [in]
        self.sums[key] = self.sums[key] + squares if key in self.sums else squares

    def norms(self, num_sequences: int) -> dict[Key, torch.Tensor]:
        return {key: (total / num_sequences).sqrt() for key, total in self.sums.items()}


def paper_norms(model: Model, tokens: torch.Tensor, masks: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """The input norms [in] of every linear while the model without the masked weights reads `tokens`."""
    sums = SquareSums()
    with model.unchanged():
        for key, mask in masks.items():
            model.linears[key].weight[mask] = 0.0
        with model.observed(sums, list(model.linears)):
            for row in tokens:
                model.model(row[None], use_cache=False)
    return sums.norms(len(tokens))


def share(rates: Sequence[float], sizes: Sequence[int], total: int, decimals: int) -> list[int]:
    """Counts near (rate + one common shift) * size, between 0 and the size, that sum to `total` exactly.

    Largest remainder; remainders are compared after rounding to `decimals`, of equals the earlier gains.
    """

    def shares(shift: float) -> list[float]:
        return [min(max(rate + shift, 0.0), 1.0) * size for rate, size in zip(rates, sizes, strict=True)]

    assert 0 <= total <= sum(sizes)
    low, high = -1.0 - max(rates), 2.0 - min(rates)
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(shares(middle)) < total:
            low = middle
        else:
            high = middle
    one = 10**decimals
    units = [round(value * one) for value in shares((low + high) / 2)]
    counts = [unit // one for unit in units]
    missing = total - sum(counts)
    assert missing >= 0
    for index in sorted(range(len(units)), key=lambda index: (-(units[index] % one), index)):
        if missing > 0 and counts[index] < sizes[index]:
            counts[index] += 1
            missing -= 1
    assert missing == 0
    return counts


def paper_counts(model: Model, rates: dict[Key, list[float]], sparsity: float) -> dict[Key, list[int]]:
    """Removed weights per row of every linear, together round(sparsity * all weights): linears, then rows."""
    sizes = [linear.weight.numel() for linear in model.linears.values()]
    means = [math.fsum(rates[key]) / len(rates[key]) for key in model.linears]
    of_linears = share(means, sizes, round(sparsity * sum(sizes)), decimals=4)
    counts = {}
    for (key, linear), count in zip(model.linears.items(), of_linears, strict=True):
        counts[key] = share(rates[key], [linear.in_features] * linear.out_features, count, decimals=6)
    return counts


def paper_block_rates(sparsity: float, lam: float, num_blocks: int) -> list[float]:
    """Rates from sparsity - lam in the first block to sparsity + lam in the last, evenly spaced."""
    if num_blocks == 1:
        return [sparsity]
    return [sparsity - lam + 2 * lam * block / (num_blocks - 1) for block in range(num_blocks)]


def same_rates(model: Model, block_rates: Sequence[float]) -> dict[Key, list[float]]:
    return {key: [block_rates[key[0]]] * linear.out_features for key, linear in model.linears.items()}


def rows_of_signal(model: Model, path: str, signal: list[float]) -> list[float]:
    """The consumer's signal for each row of the linear at `path`; grouped key and value rows get the mean."""
    heads, groups = model.query_heads(), model.key_value_heads()
    if path not in ("self_attn.k_proj", "self_attn.v_proj") or heads == groups:
        return signal
    head_size = len(signal) // heads
    per_group = heads // groups
    rows = []
    for group in range(groups):
        for dimension in range(head_size):
            members = range(group * per_group, (group + 1) * per_group)
            rows.append(math.fsum(signal[head * head_size + dimension] for head in members) / per_group)
    return rows


def paper_row_rates(signal: list[float], rate: float, lam: float) -> list[float]:
    """Rates per row: the density rises with the signal over a width of 2 lam, its mean stays 1 - rate."""
    lowest, highest = min(signal), max(signal)
    if lowest == highest:
        return [rate] * len(signal)
    densities = [(value - lowest) / (highest - lowest) * 2 * lam for value in signal]
    mean = math.fsum(densities) / len(densities)
    return [1 - (density - mean + 1 - rate) for density in densities]


def shares_of_sum(norms: torch.Tensor) -> torch.Tensor:
    """The norms over their sum; zeros stay zeros (a linear all of whose inputs are 0)."""
    total = norms.sum()
    return norms if total == 0 else norms / total


def paper_alignment(dense: dict[Key, torch.Tensor], sparse: dict[Key, torch.Tensor]) -> float:
    """Equation 2 of the paper on norms [in] by linear, in float64."""
    score = 0.0
    for key, reference in dense.items():
        difference = shares_of_sum(reference) - shares_of_sum(sparse[key])
        score += math.sqrt(difference.square().sum().item()) / len(reference)
    return score


@dataclass(frozen=True)
class Paper:
    """Everything of Algorithm 1 that is computed once."""

    model: Model
    sparsity: float
    search_tokens: torch.Tensor
    dense_scores: dict[Key, torch.Tensor]
    dense_norms: dict[Key, torch.Tensor]  # over the search tokens

    def counts(self, rates: dict[Key, list[float]]) -> dict[Key, list[int]]:
        return paper_counts(self.model, rates, self.sparsity)

    def sparse_norms(self, rates: dict[Key, list[float]]) -> dict[Key, torch.Tensor]:
        counts = self.counts(rates)
        masks = {key: cut(self.dense_scores[key], counts[key]) for key in counts}
        return paper_norms(self.model, self.search_tokens, masks)

    def row_rates(
        self, block_rates: Sequence[float], sparse: dict[Key, torch.Tensor], lam: float
    ) -> dict[Key, list[float]]:
        rates = same_rates(self.model, block_rates)
        for index, path in self.model.linears:
            consumer = self.model.family.paper[path]
            source = (index + consumer.ahead, consumer.path)
            if source in self.model.linears:
                signal = rows_of_signal(self.model, path, (self.dense_norms[source] - sparse[source]).tolist())
                rates[index, path] = paper_row_rates(signal, block_rates[index], lam)
        return rates


def paper_setting(
    model: Model, calibration: torch.Tensor, *, search_samples: int, method: str, sparsity: float
) -> Paper:
    norms = paper_norms(model, calibration, {})
    scores = {}
    for key, linear in model.linears.items():
        scores[key] = method_score(linear.weight.detach(), norms[key], method)
    search_tokens = calibration[:search_samples]
    return Paper(model, sparsity, search_tokens, scores, paper_norms(model, search_tokens, {}))


def paper_final(
    setting: Paper, calibration: torch.Tensor, *, method: str, rates: dict[Key, list[float]], score_stream: str
) -> dict[Key, torch.Tensor]:
    """The final masks, from the dense scores or from scores taken block after block on the pruned stream."""
    counts = setting.counts(rates)
    if score_stream == "dense":
        return {key: cut(setting.dense_scores[key], counts[key]) for key in counts}
    assert score_stream == "pruned", score_stream
    model = setting.model
    masks = {}
    with model.unchanged():
        carried = model.first_carried(calibration)
        for index in range(len(model.blocks)):
            keys = [key for key in model.linears if key[0] == index]
            sums = SquareSums()
            with model.observed(sums, keys):
                model.through_block(index, carried)
            norms = sums.norms(len(calibration))
            for key in keys:
                weight = model.linears[key].weight
                masks[key] = cut(method_score(weight, norms[key], method), counts[key])
                weight[masks[key]] = 0.0
            carried = model.through_block(index, carried)
    return masks


# The mode "authors"


class RunningMeans:
    """The released code's running mean over sequences of the squared input norms, in float32."""

    def __init__(self) -> None:
        self.means: dict[Key, torch.Tensor] = {}
        self.seen: dict[Key, int] = {}

    def __call__(self, key: Key, inputs: torch.Tensor) -> None:
        if key not in self.means:
            self.means[key] = torch.zeros(inputs.shape[1])
            self.seen[key] = 0
        self.means[key] *= self.seen[key] / (self.seen[key] + 1)
        self.seen[key] += 1
        self.means[key] += torch.norm(inputs.t(), p=2, dim=1) ** 2 / self.seen[key]

    def norms(self) -> dict[Key, torch.Tensor]:
        return {key: mean.sqrt() for key, mean in self.means.items()}


def authors_block_rates(sparsity: float, lam: float, num_blocks: int) -> list[float]:
    """A ramp of densities of width 2 lam about 1 - sparsity, the densest first.

    Rates of 0 or less become 0.01, of 1 or more 0.99.
    """
    ramp = torch.arange(1, num_blocks + 1, dtype=torch.float64).numpy()
    if num_blocks > 1:
        ramp = (ramp - ramp.min()) * (1 / (ramp.max() - ramp.min()) * lam * 2)
    densities = ramp - ramp.mean() + (1 - sparsity)
    rates = []
    for density in sorted(densities.tolist(), reverse=True):
        rate = 1 - density
        rates.append(0.01 if rate <= 0 else 0.99 if rate >= 1 else rate)
    return rates


def authors_row_rates(signal: torch.Tensor, rate: float, lam: float) -> list[float]:
    """Rates per row whose densities rise with the signal [out], in float64, bounded by 0.01 and 0.99."""
    values = signal.double().numpy()
    if values.max() == values.min():
        return [rate] * len(values)
    densities = (values - values.min()) * (1 / (values.max() - values.min()) * lam * 2)
    densities = densities - densities.mean() + (1 - rate)
    return [min(max(1 - density, 0.01), 0.99) for density in densities.tolist()]


def floor_removed(rate: float, linear: nn.Linear) -> list[int]:
    """The count rule of uniform pruning and of the block step."""
    return [int(linear.in_features * rate)] * linear.out_features


def floor_kept(rates: Sequence[float], linear: nn.Linear) -> list[int]:
    """The count rule of the row step and of the final pruning after it, also where all rows have one rate."""
    return [linear.in_features - int(linear.in_features * (1 - rate)) for rate in rates]


@dataclass(frozen=True)
class Walk:
    """One pass of the released code over the blocks: its score, dense minus sparse norms, and the masks."""

    score: float
    differences: dict[Key, torch.Tensor]
    masks: dict[Key, torch.Tensor]


def authors_walk(model: Model, carried: list[Carried], method: str, counts: dict[Key, list[int]], pick: Pick) -> Walk:
    """Prunes block after block, comparing each with its dense self on the pruned model's inputs."""
    score = 0.0
    differences, masks = {}, {}
    with model.unchanged():
        for index in range(len(model.blocks)):
            keys = model.authors_keys(index)
            means = RunningMeans()
            with model.observed(means, keys):
                model.through_block(index, carried)
            dense = means.norms()
            for key in keys:
                weight = model.linears[key].weight
                masks[key] = pick(method_score(weight, dense[key], method), counts[key])
                weight[masks[key]] = 0.0
            means = RunningMeans()
            with model.observed(means, keys):
                carried = model.through_block(index, carried)
            sparse = means.norms()
            for key in keys:
                error = torch.norm(dense[key] / dense[key].sum() - sparse[key] / sparse[key].sum())
                score += error.item() / len(dense[key])
                differences[key] = dense[key] - sparse[key]
    return Walk(score, differences, masks)


def authors_block_counts(model: Model, block_rates: Sequence[float]) -> dict[Key, list[int]]:
    return {key: floor_removed(block_rates[key[0]], linear) for key, linear in model.linears.items()}


def authors_row_counts(
    model: Model, block_rates: Sequence[float], differences: dict[Key, torch.Tensor], lam: float
) -> dict[Key, list[int]]:
    grouped = model.config.model_type == "mistral" or model.query_heads() != model.key_value_heads()
    last = len(model.blocks) - 1
    counts = {}
    for (index, path), linear in model.linears.items():
        rates = [block_rates[index]] * linear.out_features
        if index != last and not (grouped and path in QKV):
            consumer = model.family.authors[path]
            signal = differences[index + consumer.ahead, consumer.path]
            rates = authors_row_rates(signal, block_rates[index], lam)
        counts[index, path] = floor_kept(rates, linear)
    return counts


# Both modes


def first_minimum(scores: dict[float, float]) -> float:
    """The lambda of the least score, the first of equals; a first score that is not a number stays."""
    best = next(iter(scores))
    for lam, score in scores.items():
        if score < scores[best]:
            best = lam
    return best


def uniform(
    model: nn.Module, calibration: torch.Tensor, *, mode: str, method: str, sparsity: float, score_stream: str
) -> OracleResult:
    """Every row of every linear at the target sparsity; `calibration` is int64 [sequences, seqlen].

    `mode` is "paper" or "authors"; `score_stream`, "dense" or "pruned", is for the paper mode's final masks.
    """
    wrapped = Model(model)
    rates = [sparsity] * len(wrapped.blocks)
    if mode == "authors":
        counts = authors_block_counts(wrapped, rates)
        walk = authors_walk(wrapped, wrapped.first_carried(calibration), method, counts, cut)
        return OracleResult({}, {}, None, None, walk.masks)
    assert mode == "paper", mode
    setting = paper_setting(wrapped, calibration, search_samples=1, method=method, sparsity=sparsity)
    row_rates = same_rates(wrapped, rates)
    masks = paper_final(setting, calibration, method=method, rates=row_rates, score_stream=score_stream)
    return OracleResult({}, {}, None, None, masks)


def neuronal(
    model: nn.Module,
    calibration: torch.Tensor,
    *,
    search_samples: int,
    mode: str,
    method: str,
    sparsity: float,
    steps: str,
    block_lambdas: Sequence[float],
    row_lambdas: Sequence[float],
    score_stream: str,
) -> OracleResult:
    """NeuronAL; `steps` is "both", "block" or "row", the search reads the first `search_samples` sequences.

    The mode "authors" leaves block lambda 0.25 out from sparsity 0.8 on, as the released code does.
    """
    assert steps in ("both", "block", "row"), steps
    wrapped = Model(model)
    if mode == "authors":
        return authors_neuronal(
            wrapped,
            calibration,
            search_samples=search_samples,
            method=method,
            sparsity=sparsity,
            steps=steps,
            block_lambdas=[lam for lam in block_lambdas if not (sparsity >= 0.8 and lam == 0.25)],
            row_lambdas=row_lambdas,
        )
    assert mode == "paper", mode
    setting = paper_setting(wrapped, calibration, search_samples=search_samples, method=method, sparsity=sparsity)
    block_scores: dict[float, float] = {}
    row_scores: dict[float, float] = {}
    lambda_block = lambda_row = None
    block_rates = [sparsity] * len(wrapped.blocks)
    if steps != "row":
        for lam in block_lambdas:
            rates = same_rates(wrapped, paper_block_rates(sparsity, lam, len(wrapped.blocks)))
            block_scores[lam] = paper_alignment(setting.dense_norms, setting.sparse_norms(rates))
        lambda_block = first_minimum(block_scores)
        block_rates = paper_block_rates(sparsity, lambda_block, len(wrapped.blocks))
    final_rates = same_rates(wrapped, block_rates)
    if steps != "block":
        around = setting.sparse_norms(final_rates)
        for lam in row_lambdas:
            rates = setting.row_rates(block_rates, around, lam)
            row_scores[lam] = paper_alignment(setting.dense_norms, setting.sparse_norms(rates))
        lambda_row = first_minimum(row_scores)
        final_rates = setting.row_rates(block_rates, around, lambda_row)
    masks = paper_final(setting, calibration, method=method, rates=final_rates, score_stream=score_stream)
    return OracleResult(block_scores, row_scores, lambda_block, lambda_row, masks)


def authors_neuronal(
    model: Model,
    calibration: torch.Tensor,
    *,
    search_samples: int,
    method: str,
    sparsity: float,
    steps: str,
    block_lambdas: Sequence[float],
    row_lambdas: Sequence[float],
) -> OracleResult:
    carried = model.first_carried(calibration)
    search_carried = carried[:search_samples]
    block_scores: dict[float, float] = {}
    row_scores: dict[float, float] = {}
    lambda_block = lambda_row = None
    block_rates = [sparsity] * len(model.blocks)
    if steps != "row":
        for lam in block_lambdas:
            rates = authors_block_rates(sparsity, lam, len(model.blocks))
            counts = authors_block_counts(model, rates)
            walk = authors_walk(model, search_carried, method, counts, cut)
            block_scores[lam] = walk.score
        lambda_block = first_minimum(block_scores)
        block_rates = authors_block_rates(sparsity, lambda_block, len(model.blocks))
    final_counts = authors_block_counts(model, block_rates)
    if steps != "block":
        differences = authors_walk(model, search_carried, method, final_counts, cut).differences
        for lam in row_lambdas:
            counts = authors_row_counts(model, block_rates, differences, lam)
            row_scores[lam] = authors_walk(model, search_carried, method, counts, cut_later).score
        lambda_row = first_minimum(row_scores)
        final_counts = authors_row_counts(model, block_rates, differences, lambda_row)
    pick = cut if steps == "block" else cut_later
    masks = authors_walk(model, carried, method, final_counts, pick).masks
    return OracleResult(block_scores, row_scores, lambda_block, lambda_row, masks)
