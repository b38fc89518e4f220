"""`python -m neuronal_ray.benchmark.runtimes.child JSON`: one model in one runtime, timed at the word of another process.

Answers are lines of stdout that start with ANSWER: one when the model is loaded, one for each line of stdin, which
asks for a round, and one with the memory at the end of stdin. Runs under Pythons that have no torch.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median

from neuronal_ray.cli.memory import peak_bytes, resident_bytes

ANSWER = "@measured "


def main() -> None:
    """Serve until stdin ends."""
    asked = json.loads(sys.argv[1])
    module = import_module(asked.pop("module"))  # imports are not load time

    import numpy as np

    from neuronal_ray.benchmark.runtimes import Opening

    vocabulary = asked.pop("vocabulary")
    opening = Opening(**(asked | {"path": Path(asked["path"])}))
    begin = time.perf_counter()
    session = module.open_session(opening)
    _answer(load_s=time.perf_counter() - begin)
    for line in sys.stdin:
        job = json.loads(line)
        shape = (job["sequences"], job["prompt"])
        tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int64)
        begin = time.perf_counter()
        chosen = session.prefill(tokens)
        prefill_s = time.perf_counter() - begin
        steps = []
        for _ in range(job["tokens"]):
            begin = time.perf_counter()
            chosen = session.decode(chosen)
            steps.append(time.perf_counter() - begin)
        _answer(prefill_s=prefill_s, step_s=median(steps))
    held, peak = resident_bytes(), peak_bytes()
    if opening.device == "cuda":
        import torch

        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    _answer(held_bytes=held, peak_bytes=peak)


def _answer(**values: float) -> None:
    print(ANSWER + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
