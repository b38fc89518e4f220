"""Options of `neuronal-ray evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from neuronal_ray.cli.config import BenchmarkConfig
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import Option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BenchmarkConfig):
    """Options of `neuronal-ray evaluate`."""

    evaluate: Annotated[
        tuple[str, ...],
        Option(
            "names",
            "comma-separated: perplexity on wikitext2, c4, ptb, builtin or text files; accuracy on rte, winogrande, "
            "boolq, hellaswag, arc_easy, arc_challenge, openbookqa (zero-shot: all seven) or any other lm-eval task",
        ),
    ] = ("wikitext2",)
    output: Annotated[
        Path | None,
        Option(
            "path",
            "JSON file that receives the results, which are printed in any case; it must not exist yet, unless this "
            "command wrote it",
        ),
    ] = None
    overwrite: Annotated[bool, Option("switch", "replace the output file, whatever it is")] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        super().check()
        if not self.evaluate:
            raise BadInput("--evaluate: no text or benchmark named")
