"""Options of `neuronal-ray prune`."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from neuronal_ray.algorithms import registry
from neuronal_ray.cli.config import BenchmarkConfig
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import Option, flag_of
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS

logger = logging.getLogger(__name__)

Settings = Mapping[str, object]

_MOST_PASSES = 1_000_000
_OWNERS = ("method", "allocation", "refinement", "row-step")
_FOR_PLUG_INS = ("search_budget", "neuronal_steps", "block_lambdas", "row_lambdas", "schedule", "lambda_search")
"""Options whose values go to the allocations and row steps that have an argument of that name."""


def _one_of(kind: str) -> str:
    return f"{', '.join(registry.names(kind))}, or {registry.OUTSIDE_FORM}"


@dataclass(frozen=True, kw_only=True)
class PruneConfig(BenchmarkConfig):
    """Options of `neuronal_ray.prune`."""

    output: Annotated[
        Path | None,
        Option(
            "path",
            "directory to write: a Hugging Face model, pruning.json, allocation.parquet, search.parquet, "
            "report.html; it must not exist yet",
        ),
    ] = None
    sparsity: Annotated[
        float | None,
        Option(
            "float",
            "fraction of the blocks' linear weights to remove, 0 to 1; if absent 0.7, or what a fixed --pattern gives",
        ),
    ] = None
    method: Annotated[
        str,
        Option(
            "str",
            "how weights are chosen: by a score in each row, or by a solver that also updates the weights that stay "
            f"(sparsegpt, alps): {_one_of('methods')}",
        ),
    ] = "wanda"
    allocation: Annotated[
        str | None,
        Option(
            "str",
            f"how sparsity is spread over blocks and linears: {_one_of('allocations')}; if absent adaptive (`best` "
            "mode) or neuronal, or uniform with a fixed --pattern",
        ),
    ] = None
    row_step: Annotated[
        str | None,
        Option(
            "str",
            f"how sparsity is then spread over the rows of each linear: {_one_of('rows')}; if absent neuronal after "
            "--allocation neuronal, otherwise rows stay as the allocation has them",
        ),
    ] = None
    refinement: Annotated[
        str, Option("str", f"improve the masks without changing the count of any row: none, {_one_of('refinements')}")
    ] = "none"
    refined_parts: Annotated[
        str, Option("str", "sub-block of each block that is refined", choices=("attention", "mlp", "all"))
    ] = "attention"
    pattern: Annotated[
        str,
        Option(
            "str",
            "unstructured, N:M (N of every M aligned inputs are kept: 2:4, 4:8), or n:M (n may differ between linears)",
        ),
    ] = "unstructured"
    revive: Annotated[
        bool,
        Option(
            "switch",
            "let methods that update weights (sparsegpt, alps) give new values to weights that are zero in the input, "
            "and allow a --sparsity below the input's; otherwise zeros stay zeros and count as removed",
        ),
    ] = False
    mode: Annotated[
        str,
        Option(
            "str",
            "best: search over blocks, sub-blocks and rows by output divergence; paper: NeuronAL's Algorithm 1 as "
            "printed, with one dense pass and an exact budget; authors: what NeuronAL's released code does",
            choices=("best", "paper", "authors"),
        ),
    ] = "best"
    criterion: Annotated[
        str | None,
        Option(
            "str",
            "what candidates are compared by: neuron alignment, or the KL divergence of next-token distributions from "
            "those of the dense model. If absent kl in `best` mode, alignment in the other modes",
            choices=("alignment", "kl"),
        ),
    ] = None
    search_budget: Annotated[
        int,
        Option(
            "int",
            "passes of the search text that --allocation adaptive may spend; no plan that it tried is better than the "
            "result on both halves of the search text (NeuronAL spends 29; its candidates for blocks are tried from 42 "
            "on, those for rows from 87)",
            least=1,
            most=_MOST_PASSES,
        ),
    ] = 140
    neuronal_steps: Annotated[
        str, Option("str", "which steps of NeuronAL to run", choices=("both", "block", "row"))
    ] = "both"
    block_lambdas: Annotated[tuple[float, ...], Option("numbers", "lambdas that the block step tries")] = LAMBDAS
    row_lambdas: Annotated[tuple[float, ...], Option("numbers", "lambdas that the row step tries")] = ROW_LAMBDAS
    schedule: Annotated[
        str, Option("str", "how NeuronAL's block sparsities rise with depth", choices=("linear", "exp", "log"))
    ] = "linear"
    lambda_search: Annotated[
        str,
        Option(
            "str",
            "set: try every lambda of the list; continuous: minimize over the range of the list with as many trials",
            choices=("set", "continuous"),
        ),
    ] = "set"
    score_stream: Annotated[
        str | None,
        Option(
            "str",
            "activations that the final scores are computed from: those of the dense model, or of the model pruned so "
            "far. If absent dense, but pruned for methods that update weights; `authors` mode always uses pruned",
            choices=("dense", "pruned"),
        ),
    ] = None
    calibration: Annotated[
        str,
        Option(
            "str",
            "text: c4, wikitext2, ptb, builtin; a .txt, .jsonl, .json, .csv, .parquet or .arrow file, also compressed "
            "(.gz, .zst, .bz2, .xz), or a directory of such files or of datasets.save_to_disk; OWNER/NAME, "
            "OWNER/NAME:CONFIGURATION or OWNER/NAME:CONFIGURATION:SPLIT on the hub; or tokens, a .safetensors file",
        ),
    ] = "c4"
    calibration_samples: Annotated[
        int, Option("int", "number of sequences for the scores, no two of them equal", least=1)
    ] = 128
    calibration_packing: Annotated[
        str,
        Option(
            "str",
            "join documents that are not longer than --sequence-length, in the order in which they are drawn, into "
            "sequences; each with the special tokens that the tokenizer adds or, if it adds none, EOS at its end. off: "
            "sequences only from longer documents, as in the papers. auto: in `best` mode on where most documents are "
            "short and the long ones too few, otherwise off",
            choices=("auto", "on", "off"),
        ),
    ] = "auto"
    search_samples: Annotated[int, Option("int", "number of these sequences, the first ones, for the search")] = 8
    seed: Annotated[int, Option("int", "random seed for the choice of calibration sequences")] = 0
    evaluate: Annotated[
        tuple[str, ...],
        Option(
            "names",
            "what to measure on the dense and the pruned model: perplexity on wikitext2, c4, ptb, builtin or files; "
            "accuracy on rte, winogrande, boolq, hellaswag, arc_easy, arc_challenge, openbookqa (zero-shot: all seven) "
            "or any other task of lm-eval; or `none`",
        ),
    ] = ("wikitext2",)
    baselines: Annotated[
        bool, Option("switch", "also evaluate uniform sparsity and the plan after the block step, at the same budget")
    ] = False
    settings: Annotated[
        Settings,
        Option(
            "settings",
            "a setting of the method, allocation, row step or refinement, for example allocation.lam=0.1; may be "
            "repeated",
        ),
    ] = field(default_factory=dict)
    overwrite: Annotated[bool, Option("switch", "replace the output directory if it exists")] = False
    resume: Annotated[
        bool, Option("switch", "continue an earlier run into the same output directory that was stopped")
    ] = False
    dry_run: Annotated[bool, Option("switch", "check everything, print the plan of the run, and stop")] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        super().check()
        registry.check_name("methods", self.method)
        for kind, name in (("allocations", self.allocation), ("rows", self.row_step)):
            if name is not None:
                registry.check_name(kind, name)
        if self.refinement != "none":
            registry.check_name("refinements", self.refinement)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise BadInput(f"--sparsity: {self.sparsity} is outside [0, 1), expected for example 0.7")
        if not 1 <= self.search_samples <= self.calibration_samples:
            raise BadInput(
                f"--search-samples: {self.search_samples} is not in [1, {self.calibration_samples}], the calibration "
                "samples of which they are the first"
            )
        for flag, lambdas in (("block-lambdas", self.block_lambdas), ("row-lambdas", self.row_lambdas)):
            if not lambdas or min(lambdas) < 0 or max(lambdas) > 1:
                raise BadInput(f"--{flag}: expected numbers in [0, 1], got {', '.join(map(str, lambdas)) or 'none'}")
        for key in self.settings:
            if key.partition(".")[0] not in _OWNERS:
                raise BadInput(f"--set {key}: expected {', '.join(f'{owner}.NAME=VALUE' for owner in _OWNERS)}")

    def warn_of_ignored(self) -> None:
        """Warn of options that have no effect with the other options."""
        given = [
            entry.name
            for entry in fields(self)
            if entry.name in _FOR_PLUG_INS and getattr(self, entry.name) != entry.default
        ]
        if given and self.allocation is not None:  # loading a plug-in takes seconds, as it imports torch
            allocator = registry.load("allocations", self.allocation)
            read = self._options_of(allocator.allocate, allocator.options)
            if self.row_step is not None:
                rows = registry.load("rows", self.row_step)
                read |= self._options_of(rows.spread_rows, rows.options)
            for name in given:
                if name not in read.values():
                    step = "" if self.row_step is None else f" and --row-step {self.row_step}"
                    logger.warning("%s: ignored by --allocation %s%s", flag_of(name), self.allocation, step)
        if self.refinement == "none" and self.refined_parts != "attention":
            logger.warning("%s: ignored without --refinement", flag_of("refined_parts"))

    def settings_of(self, owner: str) -> dict[str, object]:
        """Return the `--set` settings of the method, allocation, row step or refinement, by their own names."""
        return {key.partition(".")[2]: value for key, value in self.settings.items() if key.startswith(owner + ".")}

    def passed_to(self, function: Callable[..., object], renamed: Mapping[str, str]) -> dict[str, object]:
        """Return the values of options that `function` has arguments for; `renamed` are options by argument."""
        return {argument: getattr(self, option) for argument, option in self._options_of(function, renamed).items()}

    @staticmethod
    def _options_of(function: Callable[..., object], renamed: Mapping[str, str]) -> dict[str, str]:
        """Return the options that set arguments of `function`, by argument."""
        options = {argument: renamed.get(argument, argument) for argument in registry.arguments_of(function)}
        return {argument: option for argument, option in options.items() if option in _FOR_PLUG_INS}
