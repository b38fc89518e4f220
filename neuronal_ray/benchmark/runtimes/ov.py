"""Generation by OpenVINO on the CPU, with the graph's weights or with 8-bit weights."""

from collections.abc import Mapping

import openvino

from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.benchmark.runtimes.graph import PAST, Array, GraphSession

_SPARSE_FROM = 0.5
"""The share of zeros from which a weight stays packed, on processors with the instructions for it (AMX)."""


class OpenVinoSession(GraphSession):
    """See GraphSession."""

    def __init__(self, opening: Opening) -> None:
        core, config = openvino.Core(), {"INFERENCE_NUM_THREADS": opening.threads, "PERFORMANCE_HINT": "LATENCY"}
        model = core.read_model(str(opening.path))
        if opening.runtime == "openvino-8bit":
            import nncf

            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
            config["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = _SPARSE_FROM
        self._request = core.compile_model(model, "CPU", config).create_infer_request()
        self._outputs = {value.get_any_name(): value for value in model.outputs}
        shapes = {value.get_any_name(): value.get_partial_shape() for value in model.inputs}
        super().__init__(
            set(shapes),
            {
                name: (shape[1].get_length(), shape[3].get_length())
                for name, shape in shapes.items()
                if name.startswith(PAST)
            },
        )

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """See GraphSession."""
        results = self._request.infer(dict(feed))
        return {name: results[index].copy() for index, name in enumerate(self._outputs)}


def open_session(opening: Opening) -> OpenVinoSession:
    """Open a graph that `export --format onnx` wrote."""
    return OpenVinoSession(opening)
