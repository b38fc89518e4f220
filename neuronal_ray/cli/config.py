"""The options that several commands share, as frozen dataclasses that are checked once; errors name the flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from neuronal_ray.cli.address import check_form
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import Option, check_bounds
from neuronal_ray.cli.read_files import is_directory

_MOST_WORKERS = 65_536
_MOST_EXAMPLES = 1_000
_A_YEAR = 365 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of every command that loads a model."""

    model: Annotated[
        str,
        Option(
            "str",
            "a local model directory, an id on the Hugging Face hub, or `builtin` (the small model of this package)",
        ),
    ]
    revision: Annotated[
        str | None,
        Option("str", "the branch, tag or commit of a model on the hub; default: its main branch"),
    ] = None
    sequence_length: Annotated[
        int | None,
        Option("int", "tokens per sequence; default: 2048, or the model's context if that is shorter", least=2),
    ] = None
    address: Annotated[
        str | None,
        Option(
            "str",
            "where workers run: `none` (in this process), `local` (on a Ray started for this run), `auto` (on the Ray "
            "that is running), HOST:PORT or ray://HOST:PORT; default: the cluster of the Ray job that runs the "
            "command, else `local` if there are several GPUs, else `none`",
        ),
    ] = None
    replicas: Annotated[
        int | None,
        Option(
            "int",
            "copies of the model, which share the work; default: as many as fit on the GPUs, else one per node",
            least=1,
            most=_MOST_WORKERS,
        ),
    ] = None
    shards: Annotated[
        int | None,
        Option(
            "int",
            "workers that share one copy of the model, each holding some of its blocks; default: as few as fit",
            least=1,
            most=_MOST_WORKERS,
        ),
    ] = None
    task_timeout: Annotated[
        int,
        Option(
            "int",
            "seconds after which a task on Ray counts as hung and is repeated by a new worker",
            least=1,
            most=_A_YEAR,
        ),
    ] = 7200
    device: Annotated[str, Option("str", "the device that workers compute on", choices=("auto", "cpu", "cuda"))] = (
        "auto"
    )
    dtype: Annotated[
        str,
        Option(
            "str",
            "dtype of the computation; auto: the checkpoint's on a GPU, float32 on a CPU. Saved weights keep the "
            "checkpoint's dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
    ] = "auto"
    threads: Annotated[
        int | None, Option("int", "CPU threads of each worker; default: the machine's cores, shared evenly", least=1)
    ] = None
    trust_remote_code: Annotated[
        bool, Option("switch", "run the Python code that comes with the model; only for sources you trust")
    ] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        check_bounds(self)
        if self.address is not None:
            check_form(self.address)
        if self.address == "none" and self.replicas not in (None, 1):
            raise BadInput("--replicas: one process holds one worker; use --address local for more")

    def warn_of_ignored(self) -> None:
        """Warn of options that have no effect given the others: none here."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(RunConfig):
    """The options of every command that evaluates a model."""

    window_start: Annotated[
        str | None,
        Option(
            "str",
            "how each sequence of calibration and evaluation text begins. papers: with the text, cut as the papers do; "
            "bos: with the BOS token, then one token less of the text; auto: bos where the tokenizer adds BOS and the "
            "dense model reads a few windows better with it, else papers. If absent auto in `best` mode and of a model "
            "without pruning.json, papers in other modes. Benchmarks and tokenized files stay as they are",
            choices=("papers", "bos", "auto"),
        ),
    ] = None
    text_column: Annotated[
        tuple[str, ...],
        Option(
            "names",
            "column of the calibration and evaluation texts that have columns; of several, the first that a text has. "
            "If absent `text`, else `messages` (chats, through the tokenizer's chat template), else the only one of "
            "strings",
        ),
    ] = ()
    few_shot: Annotated[
        int | None,
        Option(
            "int",
            "examples before each question of a benchmark; default: as its task has it, mostly 0",
            least=0,
            most=_MOST_EXAMPLES,
        ),
    ] = None
    task_limit: Annotated[
        int | None,
        Option("int", "only the first N questions of each benchmark, for a quick try; default: all", least=1),
    ] = None
    task_data: Annotated[
        Path | None,
        Option(
            "path",
            "directory with the rows of the benchmarks, instead of the hub: rte_val.jsonl, arc_easy/test.parquet, ...",
        ),
    ] = None

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        super().check()
        if self.task_data is not None and not is_directory(self.task_data, flag="--task-data"):
            raise BadInput(f"--task-data: no directory {self.task_data}")
