"""Backend traits: every registered backend implements the documented protocols, and its traits describe its behavior."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import onnx
import pytest
from onnx import TensorProto, helper
from support import backend_graphs

from ryzen_compile import registry
from ryzen_compile.backends.api import Backend, Session, StateBinding
from ryzen_compile.backends.builder_options import OPTIONS
from ryzen_compile.backends.nvinfer import session as nvinfer_session
from ryzen_compile.backends.nvinfer.base_backend import INPUT_DTYPES
from ryzen_compile.backends.nvinfer.session import EngineSession, EngineStateBinding
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession
from ryzen_compile.backends.onnxruntime.state_binding import OnnxRuntimeStateBinding
from ryzen_compile.backends.process import worker
from ryzen_compile.backends.process.protocol import WorkerBackend
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND as RTX
from ryzen_compile.backends.traits import BackendTraits, portable_backend
from ryzen_compile.errors import BackendError
from ryzen_compile.pipeline import parser
from ryzen_compile.progress import SilentProgress

ROOT = Path(__file__).parents[2]
ALLOWED_NAMES = {
    ("ryzen_compile/cli/commands/rewrite.py", "onnxruntime"): "the default of --backend, as the help shows it",
    ("ryzen_compile/numerics/__init__.py", "onnxruntime"): "modules that comparisons import, which child processes share",
    ("ryzen_compile/processes/protocol.py", "onnxruntime"): "a library whose modules child processes may share",
    ("passes/ryzen_passes/attention/__init__.py", "tensorrt"): "the value of the option `to`",
}
"""(file, backend name) -> why the file contains the name as a string literal."""
NAMES = registry.names("backends")
BACKENDS = {name: registry.find_backend(name) for name in NAMES}
PLUGIN_OPTIONS = {"pluginInstanceNorm", "enablePluginOverride", "staticPlugins", "dynamicPlugins", "setPluginsToSerialize"}
ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ,
    "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float8_e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
    "complex64": TensorProto.COMPLEX64,
    "uint4": TensorProto.UINT4,
}
"""Element types to test. TensorRT accepts float64 and int4 too, but an engine has no such inputs: see `INPUT_DTYPES`."""


def members(protocol: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a protocol."""
    for name, member in vars(protocol).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


def differences(protocol: type, implementation: type) -> list[str]:
    """Return how the signatures of the methods of `implementation` differ from those of `protocol`.

    Further parameters of an implementation must be optional. A return type may be narrower and is not compared.
    """
    messages = []
    for name, member in members(protocol):
        if isinstance(member, property):
            continue
        implemented = getattr(implementation, name, None)
        if not inspect.isfunction(implemented):
            messages.append(f"{name} is missing")
            continue
        expected, actual = (dict(inspect.signature(function).parameters) for function in (member, implemented))
        if [parameter for parameter in actual if parameter in expected] != list(expected):
            messages.append(f"{name} has the parameters {list(actual)}, expected {list(expected)}")
            continue
        for parameter, signature in actual.items():
            if parameter in expected and signature != expected[parameter]:
                messages.append(f"{name}: `{signature}`, expected `{expected[parameter]}`")
            elif parameter not in expected and signature.default is inspect.Parameter.empty:
                messages.append(f"{name}: {parameter} is not optional")
    return messages


@pytest.mark.parametrize("protocol", [Backend, WorkerBackend])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_implements_the_protocols(name: str, protocol: type) -> None:
    backend = BACKENDS[name]
    assert differences(protocol, type(backend)) == []
    for attribute, member in members(protocol):
        if isinstance(member, property):
            assert member.fget is not None
            type_ = get_type_hints(member.fget, {"BackendTraits": BackendTraits})["return"]
            assert isinstance(getattr(backend, attribute), type_), attribute


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [
        (Session, OnnxRuntimeSession),
        (Session, EngineSession),
        (StateBinding, OnnxRuntimeStateBinding),
        (StateBinding, EngineStateBinding),
    ],
)
def test_sessions_and_state_bindings_implement_the_protocols(protocol: type, implementation: type) -> None:
    assert differences(protocol, implementation) == []


def test_differences_from_a_protocol_are_detected() -> None:
    class Wrong:
        def probe(self, verbose: bool) -> None: ...

        def build(self, request: str, progress: str) -> None: ...

        def open(self, path: str, cache_dir: str | None = None, *, map_weights: bool = False) -> None: ...

    assert differences(Backend, Wrong) == [
        "probe: verbose is not optional",
        "build: `request: 'str'`, expected `request: 'BuildRequest'`",
        "build: `progress: 'str'`, expected `progress: 'Progress'`",
        "open: `cache_dir: 'str | None' = None`, expected `cache_dir: 'str | None' = None`",  # keyword-only in the protocol
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_traits_have_the_name_of_the_backend(name: str) -> None:
    assert BACKENDS[name].name == BACKENDS[name].traits.name == name


def test_the_backends_are_tried_in_a_defined_order() -> None:
    ordered = sorted(BACKENDS, key=lambda name: BACKENDS[name].traits.priority)
    assert ordered == ["onnxruntime", "tensorrt-rtx", "tensorrt"]
    assert len({backend.traits.priority for backend in BACKENDS.values()}) == len(BACKENDS)


def test_one_backend_is_portable_and_compiles_nothing() -> None:
    assert [name for name, backend in BACKENDS.items() if backend.traits.portable] == [portable_backend()] == ["onnxruntime"]
    assert [name for name, backend in BACKENDS.items() if not backend.traits.compiles] == ["onnxruntime"]
    assert BACKENDS[portable_backend()].probe().cpu


@pytest.mark.parametrize("name", NAMES)
def test_default_pipelines_are_valid(name: str) -> None:
    assert parser.parse(BACKENDS[name].traits.default_pipeline)


@pytest.mark.parametrize("name", NAMES)
def test_native_ops_are_registered(name: str) -> None:
    assert BACKENDS[name].traits.native_ops <= {str(op) for op in registry.ops().values()}


def test_the_nvinfer_backends_implement_trt_attention() -> None:
    implementing = {name for name, backend in BACKENDS.items() if "ryzen::TRT_Attention" in backend.traits.native_ops}
    assert implementing == {"tensorrt", "tensorrt-rtx"}


def backend_names_in(source: str) -> Iterator[tuple[str, int]]:
    """Yield (backend name, line) for every string literal of `source` that contains the name as a word, except docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names = "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            for name in re.findall(rf"(?<!\w)({names})(?!\w)", node.value):
                yield name, node.lineno


def test_backend_names_in_source_are_detected() -> None:
    source = """
def f(name: str) -> bool:
    'The docstring may name onnxruntime.'
    tensorrt = name.startswith("tensorrt")
    return tensorrt or name in ("tensorrt-rtx", "onnxruntime-gpu") or name == f"{name} by onnxruntime"
"""
    assert sorted(backend_names_in(source)) == [("onnxruntime", 5), ("onnxruntime", 5), ("tensorrt", 4), ("tensorrt-rtx", 5)]


def test_no_code_outside_the_backends_depends_on_a_backend_name() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("ryzen_compile", "passes", "plugins", "models")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "ryzen_compile" / "backends")
        for name, _ in backend_names_in(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED_NAMES.keys(), "use the traits of the backend: find_traits(name)"


@pytest.mark.parametrize("name", [name for name in NAMES if BACKENDS[name].traits.compiles])
def test_plugin_options_are_supported_if_plugins_are(name: str) -> None:
    supported = {option.name for option in OPTIONS if name not in option.unsupported_backends}
    assert supported & PLUGIN_OPTIONS == (PLUGIN_OPTIONS if BACKENDS[name].traits.supports_plugins else set())


def test_a_backend_without_a_gpu_requirement_builds_on_this_machine() -> None:
    for name, backend in BACKENDS.items():
        if backend.traits.compiles and not backend.traits.needs_gpu_to_build:
            assert backend.probe().sms, name
    assert [name for name, backend in BACKENDS.items() if backend.traits.needs_gpu_to_build] == ["tensorrt"]


@pytest.mark.parametrize("name", NAMES)
def test_installed_packages_provide_their_modules(name: str) -> None:
    for package in BACKENDS[name].traits.packages:
        try:
            version(package.distribution)
        except PackageNotFoundError:
            continue
        assert find_spec(package.module) is not None


@pytest.fixture(scope="module")
def rtx() -> Iterator[Worker]:
    with worker.start_worker("tensorrt-rtx") as rtx_worker:
        yield rtx_worker


def save_identity(folder: Path, dtypes: list[str]) -> str:
    """Write a model with one Identity node per element type."""
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{prefix}{index}", ONNX_TYPES[dtype], [2, 4]) for index, dtype in enumerate(dtypes)]
        for prefix in "xy"
    )
    nodes = [helper.make_node("Identity", [f"x{index}"], [f"y{index}"]) for index in range(len(dtypes))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 24)], ir_version=11
    )
    onnx.save(model, folder / "g.onnx")
    return str(folder / "g.onnx")


def test_onnxruntime_supports_exactly_its_input_dtypes(tmp_path: Path) -> None:
    supported = {"float64"} | set(ONNX_TYPES) - {"complex64", "uint4"}
    assert BACKENDS["onnxruntime"].traits.input_dtypes == supported
    dtypes = sorted(supported & set(ONNX_TYPES))
    with BACKENDS["onnxruntime"].open(save_identity(tmp_path, dtypes)) as session:
        assert [spec.dtype for spec in session.inputs] == dtypes
    for dtype in set(ONNX_TYPES) - supported:
        with ExitStack() as stack, pytest.raises(BackendError):
            stack.enter_context(BACKENDS["onnxruntime"].open(save_identity(tmp_path, [dtype])))


def test_tensorrt_rtx_supports_exactly_its_input_dtypes(rtx: Worker, tmp_path: Path) -> None:
    supported = RTX.traits.input_dtypes & set(ONNX_TYPES)
    request = backend_graphs.build_request(save_identity(tmp_path, sorted(supported)), tmp_path / "g.plan", profiles=())
    assert RTX.build(request, SilentProgress(), worker=rtx).size_bytes
    for dtype in set(ONNX_TYPES) - supported:
        request = backend_graphs.build_request(save_identity(tmp_path, [dtype]), tmp_path / "g.plan", profiles=())
        with pytest.raises(BackendError, match="does not support the type of input `x0`"):
            RTX.build(request, SilentProgress(), worker=rtx)


def test_the_input_dtypes_of_engines_are_those_that_a_session_accepts() -> None:
    assert set(nvinfer_session._DTYPES.values()) == INPUT_DTYPES


def test_tensorrt_rtx_rejects_a_topk_above_its_maximum(rtx: Worker, tmp_path: Path) -> None:
    max_topk = RTX.traits.max_topk
    assert max_topk is not None

    def build(k: int) -> int:
        path = backend_graphs.save_graph(
            '<ir_version: 10, opset_import: ["" : 21]> '
            f"g (float[8,5000] x) => (float[8,{k}] v, int64[8,{k}] i) <int64[1] k = {{{k}}}> {{ v, i = TopK (x, k) }}",
            tmp_path / "topk.onnx",
        )
        return RTX.build(
            backend_graphs.build_request(path, tmp_path / "topk.plan", profiles=()), SilentProgress(), worker=rtx
        ).size_bytes

    assert build(max_topk)
    with pytest.raises(BackendError, match=rf"exceeds the maximum value allowed \({max_topk}\)"):
        build(max_topk + 1)


def test_tensorrt_rtx_demotes_float64_and_keeps_int64() -> None:
    """The parser states the types of the network; what it makes of int64 is not a demotion."""
    trt = RTX.load_bindings()
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(log).create_network(0)
    parsed = trt.OnnxParser(network, log).parse(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (double[4] x, int64[4] n) => (double[4] y, int64[4] m) '
            "<double[1] c = {1e300}, int64[1] big = {1099511627776}> { y = Mul (x, c)  m = Mul (n, big) }"
        ).SerializeToString()
    )
    assert parsed
    tensors = [network.get_input(0), network.get_output(0), network.get_input(1), network.get_output(1)]
    assert [tensor.dtype.name for tensor in tensors] == ["FLOAT", "FLOAT", "INT64", "INT64"]
    weights = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            weights[layer.name] = layer.weights
    assert weights["c"] == [3.4028234663852886e38]  # clamped, as demote-float64 does
    assert weights["big"] == [1 << 40]
    assert RTX.traits.demoted_dtypes == {"float64": "float32"}
