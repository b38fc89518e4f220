"""How many CPU threads a process may be asked for."""

import os

from neuronal_ray.cli.errors import BadInput

_THREADS_PER_CORE = 8
_LEAST_LIMIT = 64


def check_threads(threads: int | None) -> None:
    """Raise BadInput for many more threads than cores: OpenMP ends the process when one cannot be started."""
    cores = os.cpu_count() or 1
    most = max(_LEAST_LIMIT, _THREADS_PER_CORE * cores)
    if threads is not None and threads > most:
        raise BadInput(f"--threads: {threads} is too large, expected at most {most} on a machine of {cores} cores")
