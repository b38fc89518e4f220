"""Generation by ONNX Runtime on the CPU."""

from collections.abc import Mapping

import onnxruntime

from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.benchmark.runtimes.graph import PAST, Array, GraphSession


class OnnxRuntimeSession(GraphSession):
    """See GraphSession."""

    def __init__(self, opening: Opening) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = opening.threads
        self._session = onnxruntime.InferenceSession(str(opening.path), options, providers=["CPUExecutionProvider"])
        inputs = self._session.get_inputs()
        self._outputs = [value.name for value in self._session.get_outputs()]
        super().__init__(
            {value.name for value in inputs},
            {value.name: (value.shape[1], value.shape[3]) for value in inputs if value.name.startswith(PAST)},
        )

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """See GraphSession."""
        return dict(zip(self._outputs, self._session.run(None, feed), strict=True))


def open_session(opening: Opening) -> OnnxRuntimeSession:
    """Open a graph that `export --format onnx` wrote."""
    return OnnxRuntimeSession(opening)
