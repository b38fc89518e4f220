"""Options that several commands share, as frozen dataclasses that are checked once; errors name the flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import Option


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every command that loads a model needs to know."""

    model: Annotated[
        str,
        Option(
            "str",
            "a local model directory, an id on the Hugging Face hub, or `builtin` (the small model that comes along)",
        ),
    ]
    sequence_length: Annotated[
        int | None, Option("int", "tokens per sequence; if absent 2048, or the model's context where that is shorter")
    ] = None
    address: Annotated[
        str | None,
        Option(
            "str",
            "where workers run: `none` in this process, `local` a Ray started for this run, `auto` the running Ray, or "
            "an address. If absent: the cluster of the Ray job this is part of, else `local` with several GPUs, else "
            "`none`",
        ),
    ] = None
    replicas: Annotated[
        int | None,
        Option(
            "int",
            "copies of the model that share the work; if absent as many as GPUs, or nodes without GPUs, have room",
        ),
    ] = None
    shards: Annotated[
        int | None,
        Option(
            "int", "workers that share one copy of the model, each with some of its blocks; if absent as few as fit"
        ),
    ] = None
    task_timeout: Annotated[
        int, Option("int", "seconds after which a task on Ray counts as hung and is given to a new worker")
    ] = 7200
    device: Annotated[str, Option("str", "where workers compute", choices=("auto", "cpu", "cuda"))] = "auto"
    dtype: Annotated[
        str,
        Option(
            "str",
            "of the computation; auto is the checkpoint's own on a GPU and float32 on a CPU. The saved weights keep "
            "the checkpoint's",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
    ] = "auto"
    threads: Annotated[
        int | None, Option("int", "CPU threads of a worker; if absent the machine's cores shared evenly")
    ] = None
    trust_remote_code: Annotated[
        bool, Option("switch", "run Python code that comes with the model; only for sources you trust")
    ] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        for flag, value in (
            ("sequence-length", self.sequence_length),
            ("replicas", self.replicas),
            ("shards", self.shards),
            ("task-timeout", self.task_timeout),
        ):
            if value is not None and value < 1:
                raise BadInput(f"--{flag}: {value} is not positive")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise BadInput(f"--sequence-length: {self.sequence_length} is too short, expected at least 2 tokens")
        if self.threads is not None and self.threads < 1:
            raise BadInput(f"--threads: {self.threads} is not positive")
        if self.address == "none" and self.replicas not in (None, 1):
            raise BadInput("--replicas: one process holds one worker; use --address local for more")

    def warn_of_ignored(self) -> None:
        """Say which options have no effect beside the others: none here."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(RunConfig):
    """What every command that evaluates a model needs to know."""

    few_shot: Annotated[
        int | None, Option("int", "examples before each question of a benchmark; if absent as its task says (mostly 0)")
    ] = None
    task_limit: Annotated[
        int | None, Option("int", "questions of each benchmark, the first ones; if absent all. For trying things out")
    ] = None
    task_data: Annotated[
        Path | None,
        Option(
            "path",
            "directory with the benchmarks' rows, instead of the hub: rte_val.jsonl, arc_easy/test.parquet, ..",
        ),
    ] = None

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        super().check()
        if self.few_shot is not None and self.few_shot < 0:
            raise BadInput(f"--few-shot: {self.few_shot} is negative")
        if self.task_limit is not None and self.task_limit < 1:
            raise BadInput(f"--task-limit: {self.task_limit} is not positive")
        if self.task_data is not None and not self.task_data.is_dir():
            raise BadInput(f"--task-data: no directory {self.task_data}")
