"""The backend `acme-reference`: runs graphs with onnx's ReferenceEvaluator, the executable form of the ONNX specification."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import onnx
from onnx.reference import ReferenceEvaluator

from ryzen_compile.backends.api import BuildRequest, BuiltEngine, Capabilities, Session
from ryzen_compile.backends.input_validation import to_host_arrays
from ryzen_compile.backends.traits import BackendTraits
from ryzen_compile.errors import BackendError
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.progress import Progress
from ryzen_compile.spec.interface import Inputs, Outputs, TensorSpec


class AcmeReference:
    """Builds one file that contains the graph and its weights, and runs it on the CPU."""

    name = "acme-reference"
    traits = BackendTraits(name=name, priority=200, default_pipeline="fold")

    def probe(self) -> Capabilities:
        """Return what the backend can do on this machine: build for its CPU, and run there."""
        return Capabilities(
            available=True, version=onnx.__version__, message="runs graphs with onnx on the CPU", cpu=True, can_run=True
        )

    def build(self, request: BuildRequest, progress: Progress) -> BuiltEngine:
        """Write the graph with its weights into one file, and check that every op is implemented."""
        started = time.perf_counter()
        save(load(request.onnx_path), request.output, weights="inline")
        _evaluator(onnx.load(request.output), request.onnx_path)
        data = Path(request.output).read_bytes()
        return BuiltEngine(
            path=request.output,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            backend=self.name,
            backend_version=onnx.__version__,
            target_names=tuple(target.name for target in request.targets),
            seconds=time.perf_counter() - started,
        )

    @contextmanager
    def open(self, path: str, *, cache_dir: str | None = None, map_weights: bool = False) -> Iterator[Session]:
        """Load an engine."""
        yield ReferenceSession(path)


class ReferenceSession:
    """An engine that is ready to run."""

    def __init__(self, path: str) -> None:
        model = onnx.load(path)
        self.inputs = tuple(map(_tensor_spec, model.graph.input))
        self.outputs = tuple(map(_tensor_spec, model.graph.output))
        self._evaluator = _evaluator(model, path)

    def run(self, inputs: Inputs) -> Outputs:
        """Run once on arrays by input name, and return arrays by output name."""
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._evaluator.run(names, to_host_arrays(inputs, self.inputs)), strict=True))

    def bind_states(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse decoders with fixed-size caches."""
        raise BackendError("`acme-reference` does not run decoders", hint="use `onnxruntime`")


def _evaluator(model: onnx.ModelProto, path: str) -> ReferenceEvaluator:
    try:
        return ReferenceEvaluator(model)
    except NotImplementedError as error:
        raise BackendError(f"`acme-reference` refuses `{path}`: {error}") from error


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims=dims)


BACKEND = AcmeReference()
