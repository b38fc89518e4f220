"""Benchmarks of the released lm-eval, run on the model that a worker holds, dense or under a plan."""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from typing import Any

import datasets
import torch
from huggingface_hub.errors import HTTPError
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.plan import Plan
from neuronal_ray.data.documents import one_line
from neuronal_ray.evaluate.local_tasks import check_rows, local_task, task_manager
from neuronal_ray.evaluate.scores import BenchmarkSettings, Score
from neuronal_ray.models.bos_token import context_prefix
from neuronal_ray.models.checkpoint import load_tokenizer
from neuronal_ray.workers.tasks.final_model import logits_on_demand, under_plan
from neuronal_ray.workers.worker import Worker

_BOOTSTRAPS = 1000  # only metrics without a formula for their standard error use them; accuracy has one
_MAX_BATCH = 64
_CPU_BATCH = 16
_MEMORY_SHARE = 0.5  # of the free memory, for one batch's logits and activations
_COPIES = 3  # logits in the model's dtype, their float32 log-softmax and its input
_NAMES = {"acc": "accuracy"}
_CONTEXT_WITHOUT_LIMIT = 2048
_LONG_PROMPT = 2048  # tokens; models take more, benchmarks do not


def check_benchmarks(names: Sequence[str], settings: BenchmarkSettings) -> None:
    """Fetch the rows of every benchmark, or check local ones. Raises BadInput when they cannot be used."""
    for name in names:
        with _quietly(), _naming(name):
            if settings.data is None:
                task_manager().load([name])
            else:
                check_rows(name, settings)


def run_benchmark(worker: Worker, name: str, plan: Plan | None, settings: BenchmarkSettings) -> Score:
    """Return the score of lm-eval's task (or group) `name` on the final model under `plan`; None is the dense model.

    Runs in the last shard of a chain, which queries the others. On one worker the masked weights replace the dense
    ones meanwhile, which takes another copy of the pruned linears. Raises BadInput when the task's rows are missing.
    """
    task: str | dict[str, Any] = name if settings.data is None else local_task(name, settings)
    model = worker.replica.stream.model
    length = _context(model.config.get_text_config())
    tokenizer = load_tokenizer(worker.replica.checkpoint.path, trust_remote_code=worker.spec.trust_remote_code)
    alone = worker.spec.shards == 1 and not worker.spec.offload
    with _quietly(), under_plan(worker, plan) if alone else nullcontext():
        adapter: HFLM = (HFLM if alone else partial(_Relayed, worker, plan))(
            pretrained=model,
            tokenizer=tokenizer,
            prefix_token_id=context_prefix(tokenizer, model.config.get_text_config()),
            backend="causal",
            batch_size=_batch_size(worker.device, model.config.get_text_config().vocab_size, min(length, _LONG_PROMPT)),
            max_length=length,
        )
        with _naming(name):
            results = simple_evaluate(
                adapter,
                tasks=[task],
                num_fewshot=settings.few_shot,
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                task_manager=task_manager(),
            )
    return _score(results, name)


class _Relayed(HFLM):  # type: ignore[misc]
    """lm-eval's model over a chain of shards, run from the last shard, or over offloaded blocks."""

    def __init__(self, worker: Worker, plan: Plan | None, **settings: Any) -> None:
        self._worker, self._plan = worker, plan
        super().__init__(**settings)

    def _model_call(self, inps: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        try:
            return logits_on_demand(self._worker, inps, self._plan)
        except BadInput:
            raise
        except ValueError as error:
            raise RuntimeError(f"a fault of ours, not of lm-eval: {error}") from error

    def _model_generate(self, *_: object, **__: object) -> torch.Tensor:
        raise BadInput("--evaluate: a task that generates text needs the whole model in the memory of one device")


def _score(results: Mapping[str, Any], name: str) -> Score:
    """Return the score by the first metric of the task's configuration that lm-eval reports."""
    values = results["results"][name] if name in results["results"] else results["groups"][name]
    key = next(key for key in values if "," in key and "_stderr" not in key)
    metric, _, rule = key.partition(",")
    error = values.get(f"{metric}_stderr,{rule}")
    rows = sum(count["effective"] for count in results["n-samples"].values())
    return Score(
        metric=_NAMES.get(metric, metric),
        value=float(values[key]),
        error=float(error) if isinstance(error, int | float) else math.nan,
        rows=rows,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the bars and warnings of lm-eval and datasets: many benchmarks run in parallel, and we report each."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn errors of lm-eval, datasets and the hub into a BadInput that names the benchmark."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(
            f"--evaluate: the rows of {name} could not be read from the Hugging Face hub ({one_line(error)}); "
            "--task-data DIR takes local ones"
        ) from error
    except ValueError as error:  # for a task that it refuses, or offline for rows that were not downloaded before
        raise BadInput(f"--evaluate: lm-eval cannot run {name} ({one_line(error)})") from error


def _context(config: Any) -> int:
    """Return the longest input of the model, in tokens."""
    try:
        return int(config.max_position_embeddings)
    except AttributeError:
        return _CONTEXT_WITHOUT_LIMIT


def _batch_size(device: torch.device, vocabulary: int, length: int) -> int:
    """Return the number of sequences of `length` tokens whose logits fit in half of the device's free memory."""
    if device.type != "cuda":
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_MAX_BATCH, int(_MEMORY_SHARE * free) // (_COPIES * 4 * vocabulary * length)))
