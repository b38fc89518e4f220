"""The runtimes that `benchmark inference` knows by name, and what each of them needs."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tokens = NDArray[np.int64]


class Session(Protocol):
    """A loaded model with the key/value cache of the sequences that it generates."""

    def prefill(self, tokens: "Tokens") -> "Tokens":
        """Start anew with `tokens` [sequences, length]; return the most likely next token of each [sequences]."""
        ...

    def decode(self, tokens: "Tokens") -> "Tokens":
        """Add one token [sequences] to each sequence; return the most likely next ones [sequences]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """`module` has `open_session`; `dense` names the runtime that the dense model is measured in.

    `packages` must be importable. With `onnx` it reads an exported graph instead of a checkpoint. `dtype` is that of
    both models if it cannot be the checkpoint's.
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
    "eager": Runtime(module=_TORCH, what="transformers, eager", dense="eager"),
    "compiled": Runtime(module=_TORCH, what="transformers under torch.compile", dense="compiled"),
    "packed": Runtime(module=_TORCH, what="transformers with packed linears, compared with eager", dense="eager"),
    "csr": Runtime(
        module=_TORCH,
        what="transformers with torch's sparse CSR linears, compared with eager, float32",
        dense="eager",
        dtype="float32",
    ),
    "onnxruntime": Runtime(
        module=_ONNX, what="ONNX Runtime, float32", dense="onnxruntime", packages=(*_GRAPH, "onnxruntime"), onnx=True
    ),
    "openvino": Runtime(module=_OPENVINO, what="OpenVINO", dense="openvino", packages=(*_GRAPH, "openvino"), onnx=True),
    "openvino-8bit": Runtime(
        module=_OPENVINO,
        what="OpenVINO, 8-bit weights, sparse ones decompressed on the fly",
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
    """How a session is opened. `length` is that of the longest sequence; `dtype` None: the checkpoint's."""

    runtime: str
    path: Path
    threads: int
    device: str
    length: int
    dtype: str | None = None


def missing(runtime: Runtime) -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in runtime.packages if find_spec(name) is None]
