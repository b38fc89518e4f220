"""`python -m neuronal_ray.benchmark.runtimes.child JSON`: time one model in one runtime, commanded by another process.

Every line of stdin starts a round. Results are lines of stdout that start with ANSWER: one when the model is loaded,
one for each round, and one with the memory when stdin ends. This also runs under Pythons without torch.
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
    """Load the model and run rounds until stdin ends."""
    order = json.loads(sys.argv[1])
    module = import_module(order.pop("module"))  # imports are not load time

    import numpy as np

    from neuronal_ray.benchmark.runtimes import Opening

    vocabulary = order.pop("vocabulary")
    opening = Opening(**(order | {"path": Path(order["path"])}))
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
