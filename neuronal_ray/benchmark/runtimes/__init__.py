"""What runs a model, and what each of the runtimes needs: the names that `benchmark inference` knows."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tokens = NDArray[np.int64]


class Session(Protocol):
    """A loaded model and the key/value cache of the sequences under way."""

    def prefill(self, tokens: "Tokens") -> "Tokens":
        """Forget what was, read `tokens` [sequences, length]; the most likely next token of each [sequences]."""
        ...

    def decode(self, tokens: "Tokens") -> "Tokens":
        """One token [sequences] more for each sequence; the most likely next ones [sequences]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """`module` has `open_session`; `dense` names the runtime that the dense model is measured in.

    `packages` must be importable. With `onnx` it reads an exported graph instead of a checkpoint. `dtype` of both
    models where it cannot be the checkpoint's.
    """

    module: str
    what: str
    dense: str
    packages: tuple[str, ...] = ()
    onnx: bool = False
    dtype: str | None = None


_TORCH, _ONNX, _OPENVINO = (
    "neuronal_ray.benchmark.runtimes.pytorch",
    "neuronal_ray.benchmark.runtimes.ort",
    "neuronal_ray.benchmark.runtimes.ov",
)
_GRAPH = ("onnx", "onnxscript")

RUNTIMES = {
    "eager": Runtime(module=_TORCH, what="transformers, as it is", dense="eager"),
    "compiled": Runtime(module=_TORCH, what="transformers under torch.compile", dense="compiled"),
    "packed": Runtime(module=_TORCH, what="transformers with packed linears, against eager", dense="eager"),
    "csr": Runtime(
        module=_TORCH,
        what="transformers with torch's sparse CSR linears, against eager, float32",
        dense="eager",
        dtype="float32",
    ),
    "onnxruntime": Runtime(
        module=_ONNX, what="ONNX Runtime, float32", dense="onnxruntime", packages=(*_GRAPH, "onnxruntime"), onnx=True
    ),
    "openvino": Runtime(module=_OPENVINO, what="OpenVINO", dense="openvino", packages=(*_GRAPH, "openvino"), onnx=True),
    "openvino-8bit": Runtime(
        module=_OPENVINO,
        what="OpenVINO, 8-bit weights, sparse ones decompressed on the way",
        dense="openvino-8bit",
        packages=(*_GRAPH, "openvino", "nncf"),
        onnx=True,
    ),
    "deepsparse": Runtime(
        module="neuronal_ray.benchmark.runtimes.deep",
        what="DeepSparse 1.8, float32",
        dense="deepsparse",
        packages=_GRAPH,
        onnx=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a session is opened with. `length` is the longest that a sequence gets; no `dtype` is the checkpoint's."""

    runtime: str
    path: Path
    threads: int
    device: str
    length: int
    dtype: str | None = None


def missing(runtime: Runtime) -> list[str]:
    """The packages that are not installed."""
    return [name for name in runtime.packages if find_spec(name) is None]
