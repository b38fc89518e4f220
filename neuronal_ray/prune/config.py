"""Options of `neuronal-ray prune`."""

import logging
from collections.abc import Mapping
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

_NEURONAL_ONLY = ("neuronal_steps", "block_lambdas", "schedule")
_NEURONAL_ROWS_ONLY = ("row_lambdas", "lambda_search")
_OWNERS = ("method", "allocation", "refinement")


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
            "how weights are chosen: by a score in each row, or by a solver that also updates those that stay "
            "(sparsegpt, alps)",
            choices=tuple(registry.names("methods")),
        ),
    ] = "wanda"
    allocation: Annotated[
        str | None,
        Option(
            "str",
            "how sparsity is spread over blocks and linears; if absent adaptive (`best` mode) or neuronal, or uniform "
            "with a fixed --pattern",
            choices=tuple(registry.names("allocations")),
        ),
    ] = None
    row_step: Annotated[
        str | None,
        Option(
            "str",
            "how sparsity is then spread over the rows of each linear; if absent neuronal after --allocation neuronal, "
            "else not at all",
            choices=("neuronal", "trim"),
        ),
    ] = None
    refinement: Annotated[
        str,
        Option(
            "str",
            "improve the masks at constant counts",
            choices=("none", *registry.names("refinements")),
        ),
    ] = "none"
    refined_parts: Annotated[
        str, Option("str", "part of each block that is refined", choices=("attention", "mlp", "all"))
    ] = "attention"
    pattern: Annotated[
        str,
        Option(
            "str",
            "unstructured, N:M (N of every M aligned inputs are kept: 2:4, 4:8), or n:M (n differs between linears)",
        ),
    ] = "unstructured"
    mode: Annotated[
        str,
        Option(
            "str",
            "best: the search over blocks, their parts and rows by output divergence; paper: NeuronAL's Algorithm 1 as "
            "printed, one dense pass, exact budget; authors: what its released code does",
            choices=("best", "paper", "authors"),
        ),
    ] = "best"
    criterion: Annotated[
        str | None,
        Option(
            "str",
            "what candidates are compared by: neuron alignment, or the KL divergence of next-token distributions from "
            "the dense model's. If absent kl in `best` mode, alignment in the others",
            choices=("alignment", "kl"),
        ),
    ] = None
    search_budget: Annotated[
        int,
        Option(
            "int",
            "evaluations of the search text that --allocation adaptive may take; the best so far is the answer at any "
            "budget (NeuronAL: 29)",
        ),
    ] = 140
    neuronal_steps: Annotated[
        str, Option("str", "which steps of NeuronAL to run", choices=("both", "block", "row"))
    ] = "both"
    block_lambdas: Annotated[tuple[float, ...], Option("numbers", "candidates of the block step")] = LAMBDAS
    row_lambdas: Annotated[tuple[float, ...], Option("numbers", "candidates of the row step")] = ROW_LAMBDAS
    schedule: Annotated[
        str,
        Option("str", "how NeuronAL's block sparsities rise with depth", choices=("linear", "exp", "log")),
    ] = "linear"
    lambda_search: Annotated[
        str,
        Option(
            "str",
            "set: try every lambda listed; continuous: minimize over the range that they span, with as many trials",
            choices=("set", "continuous"),
        ),
    ] = "set"
    score_stream: Annotated[
        str | None,
        Option(
            "str",
            "activations that the final scores are taken from: of the dense model, or of the blocks pruned so far. If "
            "absent dense, pruned for methods that update weights; `authors` mode always uses pruned",
            choices=("dense", "pruned"),
        ),
    ] = None
    calibration: Annotated[
        str,
        Option("str", "text: c4, wikitext2, ptb, builtin, or a .txt, .jsonl, .parquet or tokenized .safetensors file"),
    ] = "c4"
    calibration_samples: Annotated[int, Option("int", "sequences for the scores")] = 128
    search_samples: Annotated[int, Option("int", "the first of them, for the search")] = 8
    seed: Annotated[int, Option("int", "of the draw of calibration sequences")] = 0
    evaluate: Annotated[
        tuple[str, ...],
        Option(
            "names",
            "what to measure, dense and pruned: perplexity on wikitext2, c4, ptb, builtin or files; accuracy on rte, "
            "winogrande, boolq, hellaswag, arc_easy, arc_challenge, openbookqa (zero-shot: all seven) or any other "
            "task of lm-eval; or `none`",
        ),
    ] = ("wikitext2",)
    baselines: Annotated[
        bool, Option("switch", "evaluate also uniform sparsity and the plan after the block step, at the same budget")
    ] = False
    settings: Annotated[
        Settings,
        Option(
            "settings",
            "a setting of the method, allocation or refinement, for example allocation.lam=0.1; may be repeated",
        ),
    ] = field(default_factory=dict)
    overwrite: Annotated[bool, Option("switch", "replace the output directory if it exists")] = False
    resume: Annotated[
        bool, Option("switch", "go on where an earlier run into the same output directory was stopped")
    ] = False
    dry_run: Annotated[bool, Option("switch", "check everything, print the plan of the run, and stop")] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        super().check()
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise BadInput(f"--sparsity: {self.sparsity} is outside [0, 1), expected for example 0.7")
        if self.search_budget < 1:
            raise BadInput(f"--search-budget: {self.search_budget} is not positive")
        if self.calibration_samples < 1:
            raise BadInput(f"--calibration-samples: {self.calibration_samples} is not positive")
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
        """Say which options have no effect beside the others."""
        if self.allocation not in (None, "neuronal"):
            ignored = _NEURONAL_ONLY + (() if self.row_step == "neuronal" else _NEURONAL_ROWS_ONLY)
            for entry in fields(self):
                if entry.name in ignored and getattr(self, entry.name) != entry.default:
                    logger.warning("%s: ignored, only NeuronAL has it", flag_of(entry.name))
        if self.refinement == "none" and self.refined_parts != "attention":
            logger.warning("%s: ignored without --refinement", flag_of("refined_parts"))

    def settings_of(self, owner: str) -> dict[str, object]:
        """The `--set` settings of the method, the allocation or the refinement, by their own names."""
        return {key.partition(".")[2]: value for key, value in self.settings.items() if key.startswith(owner + ".")}
