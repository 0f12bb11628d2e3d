"""The backend `onnxruntime`: runs the portable variant itself, without compiling an engine.

It runs on the CPU, and on a GPU if the CUDA build of ONNX Runtime is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.backends.api import BuildRequest, BuiltEngine, Capabilities, Session, StateBinding
from ryzen_compile.backends.input_validation import to_host_arrays
from ryzen_compile.backends.onnxruntime.quantized_weights import may_saturate
from ryzen_compile.backends.onnxruntime.state_binding import (
    ONNX_DATA_TYPES,
    OnnxRuntimeStateBinding,
    from_ort_value,
    to_ort_value,
)
from ryzen_compile.backends.onnxruntime.transposed_weights import max_folded_bytes
from ryzen_compile.backends.process.protocol import BuildDone
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.backends.traits import BackendPackage, BackendTraits
from ryzen_compile.errors import BackendError
from ryzen_compile.progress import Progress
from ryzen_compile.spec.interface import Inputs, Outputs, StateSpec, TensorSpec
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.files import hash_file
from ryzen_compile.utils.heap import trim_heap

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb

_FATAL = 4
_WARNING = 2
_UINT8_WEIGHTS = "session.x64quantprecision"
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"

_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float4e2m1": "float4_e2m1fn",
}
"""Element types that ONNX Runtime and numpy name differently: ONNX Runtime name -> numpy name."""

_INPUT_DTYPES = frozenset(
    {
        *("float16", "bfloat16", "float32", "float64"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        *("bool", "string"),
    }
)

_UNFOLDED_WARNING = "Skipping constant folding for Transpose"
"""The message on a result that `max_folded_bytes` excludes."""
_NODE_FAILURE = re.compile(r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ")
"""How ONNX Runtime introduces the failure of a node: with its op and its name."""
_SOURCE_LOCATION = re.compile(
    r"/\S+\.(?:cc|h):\d+ [\w:<>~*&, ]+\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)?(?: \[with [^]]*\])? "
)
"""The source location and the function at which ONNX Runtime raised an error."""


@dataclass(frozen=True)
class OnnxRuntime:
    """The backend `onnxruntime`, on one type of device."""

    name: ClassVar[str] = "onnxruntime"
    traits: ClassVar[BackendTraits] = BackendTraits(
        name="onnxruntime",
        portable=True,
        priority=0,
        compiles=False,
        computes_half_precision=False,
        keeps_weights_quantized=False,
        input_dtypes=_INPUT_DTYPES,
        packages=(
            BackendPackage(distribution="onnxruntime", module="onnxruntime", purpose="--gpu cpu, compare, run"),
            BackendPackage(distribution="onnxruntime-gpu", module="onnxruntime", purpose="run on CUDA"),
        ),
    )
    builder_entry_point: ClassVar[str] = "ryzen_compile.backends.onnxruntime.backend:SessionChecker"

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if the CUDA build of ONNX Runtime is installed and a GPU is present, else the CPU."""
    low_memory: bool = False
    """Whether sessions return memory as soon as a tensor is not needed, instead of keeping it for the next run."""
    optimized: bool = True
    """Whether sessions optimize the graph. If not, they neither fuse nodes nor copy weights into another layout."""
    map_weights: bool = False
    """Whether sessions on a CPU leave weights mapped from their files, which sessions and processes share, instead of copying
    them into another layout. Products with one row take 1.1 times as long, with 2 to 16 rows up to twice, with 128 rows 1.15
    times."""

    def probe(self) -> Capabilities:
        """Return whether ONNX Runtime is installed, and the devices that it supports on this machine."""
        try:
            import onnxruntime
        except ImportError as error:
            return Capabilities(
                available=False,
                version=None,
                message=f"ONNX Runtime cannot be imported: {error}",
                install_hint="pip install 'ryzen-compile[cpu]', or 'ryzen-compile[cuda]' for an NVIDIA GPU, but not both",
            )
        cuda = _CUDA in onnxruntime.get_available_providers()
        present_sms = tuple(sorted({gpu.sm for gpu in detect_gpus()}))
        sms = present_sms if cuda else ()
        devices = "the CPU and the GPU" if sms else "the CPU"
        return Capabilities(
            available=True,
            version=str(onnxruntime.__version__),
            message=f"runs portable variants on {devices} of this machine",
            install_hint="pip uninstall onnxruntime && pip install onnxruntime-gpu" if present_sms and not cuda else None,
            sms=sms,
            cpu=True,
            can_run=True,
            not_executed=("its CUDA execution provider",),
        )

    def check(self, request: BuildRequest) -> None:
        """Raise BackendError if a target is a GPU that ONNX Runtime cannot use on this machine."""
        gpu_targets = [target for target in request.targets if not target.is_cpu]
        sms = self.probe().sms if gpu_targets else ()
        for target in gpu_targets:
            if target.sm not in sms:
                raise BackendError(
                    f"`onnxruntime` cannot run on `{target}` on this machine",
                    hint="build `cpu`, or install onnxruntime-gpu on a machine with that GPU",
                )

    def build(self, request: BuildRequest, progress: Progress, *, worker: Worker | None = None) -> BuiltEngine:
        """Verify in a child process that ONNX Runtime accepts the graph; the `path` of the result is the graph itself.

        Raises BackendError if it does not.
        """
        if worker is not None:
            return worker.build(request, progress)
        with Worker(self) as new_worker:
            return new_worker.build(request, progress)

    def open(self, path: str, *, cache_dir: str | None = None, map_weights: bool = False) -> AbstractContextManager[Session]:
        """Load the graph at `path`. Raises BackendError, which names the node if possible, if ONNX Runtime rejects it."""
        return _open_session(path, dataclasses.replace(self, map_weights=self.map_weights or map_weights))


class SessionChecker:
    """The builder of the child process: creates a session of the graph and discards it."""

    def __init__(self) -> None:
        self.version = OnnxRuntime().probe().version or ""

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        """Create a session of the graph of `request`. Raises BackendError if ONNX Runtime rejects it."""
        breadcrumb.write(f"reading {request.onnx_path}")
        device: Literal["auto", "cpu"] = "auto" if any(not target.is_cpu for target in request.targets) else "cpu"
        # Mapped weights take no memory here, where a compiler of another backend may run at the same time.
        _create_inference_session(request.onnx_path, OnnxRuntime(device=device, map_weights=True), _WARNING)
        lines = [line for line in child_output.lines() if "[W:onnxruntime" in line and _UNFOLDED_WARNING not in line]
        warnings = [line.partition("] ")[2] for line in lines]
        return BuildDone(
            uses_source_graph=True,
            sha256=hash_file(Path(request.onnx_path), "sha256"),
            size_bytes=os.path.getsize(request.onnx_path),
            warnings=tuple(dict.fromkeys(warnings)),
        )


@contextlib.contextmanager
def _open_session(path: str, runtime: OnnxRuntime) -> Iterator[Session]:
    session = OnnxRuntimeSession(path, _create_inference_session(path, runtime, _FATAL))
    try:
        yield session
    finally:
        session.close()
        trim_heap()


def _create_inference_session(model: str | bytes, runtime: OnnxRuntime, severity: int) -> Any:
    """Return an InferenceSession of a graph, a path or bytes, that logs messages of at least `severity`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported: {error}", hint="pip install 'ryzen-compile[cpu]', or see `ryzen-compile doctor`"
        ) from error
    onnxruntime.disable_telemetry_events()
    use_cuda = runtime.device != "cpu" and _CUDA in onnxruntime.get_available_providers() and bool(detect_gpus())
    if runtime.device == "cuda" and not use_cuda:
        raise BackendError("ONNX Runtime found no GPU that it can use on this machine", hint="see `ryzen-compile doctor`")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = severity
    # By default ONNX Runtime quantizes the activations of a MatMul with dequantized weights to int8; level 1 computes in fp32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if runtime.low_memory:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False  # a pattern keeps tensors of dynamic shape until the end of a run
    if not runtime.optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if runtime.map_weights and not use_cuda:
        options.add_session_config_entry("session.disable_prepacking", "1")
        limit = max_folded_bytes(model) if isinstance(model, str) else None
        if limit is not None:
            options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(limit))
    providers = [_CUDA, _CPU] if use_cuda else [_CPU]
    try:
        if isinstance(model, str) and runtime.optimized and not use_cuda and may_saturate(model):
            return _create_exact_session(model, options, providers)
        try:
            return onnxruntime.InferenceSession(model, options, providers=providers)
        except _error_types() as error:
            supported = re.search(r"max supported IR version: (\d+)", str(error))
            if supported is None or not isinstance(model, str):
                raise
        return _create_rewritten_session(
            model, lambda proto: setattr(proto, "ir_version", int(supported[1])), options, providers
        )
    except _error_types() as error:
        name = f" `{model}`" if isinstance(model, str) else " a part of the graph"
        raise BackendError(f"ONNX Runtime refuses{name}: {_clean_message(error)}") from error


def _create_exact_session(model: str, options: Any, providers: list[str]) -> Any:
    """Return an InferenceSession of a quantized graph whose products do not saturate; a plain one if there is none."""
    import onnxruntime
    from google.protobuf.message import Error  # type: ignore[import-untyped]

    from ryzen_compile.backends.onnxruntime.quantized_weights import prepare_quantized_weights

    options.add_session_config_entry(_UINT8_WEIGHTS, "1")
    try:
        return _create_rewritten_session(model, prepare_quantized_weights, options, providers)
    except (Error, ValueError, *_error_types()):  # the conversion, or a model of more than 2 GB
        options.add_session_config_entry(_UINT8_WEIGHTS, "0")
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _create_rewritten_session(
    model: str, rewrite: Callable[[onnx.ModelProto], None], options: Any, providers: list[str]
) -> Any:
    """Return an InferenceSession of the graph at the path `model` after `rewrite`, which does not read external data."""
    import onnx
    import onnxruntime

    proto = onnx.load(model, load_external_data=False)
    rewrite(proto)
    folder = os.path.dirname(os.path.abspath(model))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=providers)


def run_unoptimized(model: bytes, inputs: Inputs) -> np.ndarray[Any, Any]:
    """Run a small graph on the CPU without graph optimizations and return its only output. Raises BackendError if it fails."""
    session = _create_inference_session(model, OnnxRuntime(device="cpu", optimized=False), _FATAL)
    try:
        output: np.ndarray[Any, Any] = session.run(None, dict(inputs))[0]
    except _error_types() as error:
        raise BackendError(_clean_message(error)) from error
    return output


@functools.cache
def _error_types() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    ort_errors = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*ort_errors, RuntimeError, ValueError)


def _clean_message(error: Exception) -> str:
    """Return an ONNX Runtime error, such as `: 9 : FAIL : /src/a.cc:12 f(int) Could not`, without codes and source location."""
    text = " ".join(str(error).split()).rpartition("[ONNXRuntimeError] : ")[2].split(" : ", 2)[-1]
    text = _NODE_FAILURE.sub(r"\1 `\2` failed: ", text.removeprefix("Error in execution: "))
    return _SOURCE_LOCATION.sub("", re.sub(r"^Load model from .*? failed: *(Fatal error: *)?", "", text))


class OnnxRuntimeSession:
    """A graph loaded by ONNX Runtime. Thread-safe, as ONNX Runtime's `run` is."""

    def __init__(self, path: str, session: Any) -> None:
        """Read the inputs and outputs of `session`, an ONNX Runtime InferenceSession of the graph at `path`."""
        self.path = path
        self.inputs = tuple(_tensor_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_tensor_spec(node) for node in session.get_outputs())
        self.on_gpu = session.get_providers()[0] == _CUDA
        self._session: Any = session
        self._non_numpy_tensors = {spec.name for spec in (*self.inputs, *self.outputs) if spec.dtype in ONNX_DATA_TYPES}

    def run(self, inputs: Inputs) -> Outputs:
        """Run once and return arrays, owned by the caller, by name; CPU tensors are read without a copy, through DLPack.

        Raises ShapeError for inputs that do not match the specs, BackendError if a node fails.
        """
        session = self.inference_session()
        arrays = to_host_arrays(inputs, self.inputs)
        names = [spec.name for spec in self.outputs]
        with self.translate_errors():
            if not self._non_numpy_tensors:
                return dict(zip(names, session.run(names, arrays, self.run_options()), strict=True))
            values = {name: to_ort_value(array) for name, array in arrays.items()}
            results = session.run_with_ort_values(names, values, self.run_options())
            return {spec.name: from_ort_value(value, spec) for spec, value in zip(self.outputs, results, strict=True)}

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> OnnxRuntimeStateBinding:
        """Allocate `states` on the device of the graph, or use the memory of `share_with`.

        Raises BackendError if the states of the two graphs do not match.
        """
        if share_with is not None and not isinstance(share_with, OnnxRuntimeStateBinding):
            raise BackendError("states cannot be shared between backends", hint="run both graphs on one backend")
        return OnnxRuntimeStateBinding(self, states, shapes, share_with)

    def inference_session(self) -> Any:
        """Return the ONNX Runtime InferenceSession. Raises BackendError if this session is closed."""
        if self._session is None:
            raise BackendError(f"`{self.path}` is closed", hint="run it inside the `with` block that opened it")
        return self._session

    def run_options(self) -> Any:
        """Return run options that log fatal errors only."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = _FATAL
        return options

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Convert errors of ONNX Runtime to BackendError."""
        try:
            yield
        except _error_types() as error:
            raise BackendError(f"ONNX Runtime failed on `{self.path}`: {_clean_message(error)}") from error

    def close(self) -> None:
        """Release the graph."""
        self._session = None


def _tensor_spec(node: Any) -> TensorSpec:
    container, _, element_type = str(node.type).partition("(")
    if container != "tensor":
        return TensorSpec(name=node.name, dtype=str(node.type), dims=None)
    element = element_type.rstrip(")")
    dims = tuple(dim if isinstance(dim, int) else dim or f"{node.name}.{axis}" for axis, dim in enumerate(node.shape))
    # ONNX Runtime reports no dimensions for scalars and for tensors of any rank.
    return TensorSpec(name=node.name, dtype=_DTYPES.get(element, element), dims=dims or None)


BACKEND = OnnxRuntime()
