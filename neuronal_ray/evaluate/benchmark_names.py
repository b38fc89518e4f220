"""The names that `--evaluate` takes: texts, the paper's seven tasks, any other task of lm-eval."""

import difflib
from collections.abc import Sequence
from functools import cache

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.text import EXTENSIONS, NAMES, is_directory, is_text

ZERO_SHOT = ("rte", "winogrande", "boolq", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
"""The paper's seven tasks, in the order of its tables (section 5.1)."""

MEAN = "mean"
"""The name of the mean over the seven in results."""

SETS = {"zero-shot": ZERO_SHOT}
"""Names that stand for several benchmarks."""


def split_names(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts and the benchmarks among `names`, each in order.

    Raises BadInput, with similar names, for a name that is neither.
    """
    expanded = [member for name in names for member in SETS.get(name, (name,))]
    texts = tuple(name for name in expanded if is_text(name) or _is_folder(name))
    benchmarks = tuple(dict.fromkeys(name for name in expanded if name not in texts))
    for name in benchmarks:
        if name not in ZERO_SHOT and name not in _lm_eval_tasks():
            known = [*NAMES, *SETS, *ZERO_SHOT, *_lm_eval_tasks()]
            near = difflib.get_close_matches(name, known, n=4) or [*NAMES, *SETS, *ZERO_SHOT]
            raise BadInput(
                f"--evaluate: {name!r} is neither a text nor a task of lm-eval, did you mean "
                f"{', '.join(dict.fromkeys(near))}? Files end in {', '.join(EXTENSIONS)}"
            )
    return texts, benchmarks


def _is_folder(name: str) -> bool:
    """Return whether a name without a slash is a directory: a benchmark of the same name comes first."""
    return is_directory(name) and name not in (*SETS, *ZERO_SHOT) and name not in _lm_eval_tasks()


@cache
def _lm_eval_tasks() -> tuple[str, ...]:
    """Return the names of all tasks and groups of lm-eval; reading their index takes seconds."""
    from lm_eval.tasks import TaskManager

    return tuple(TaskManager().all_tasks)
