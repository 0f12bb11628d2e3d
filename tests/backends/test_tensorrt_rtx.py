"""Real builds with TensorRT-RTX, ahead of time for GPUs that are not present."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import backend_graphs

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.builder_options import parse_options
from ryzen_compile.backends.process import worker
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.progress import SilentProgress
from ryzen_compile.spec.profile import Profile


@pytest.fixture(scope="module")
def rtx() -> Iterator[Worker]:
    with worker.start_worker("tensorrt-rtx") as rtx_worker:
        yield rtx_worker


def build_failure(rtx: Worker, request: BuildRequest) -> BackendError:
    with pytest.raises(BackendError) as caught:
        BACKEND.build(request, SilentProgress(), worker=rtx)
    assert not os.path.exists(request.output)
    assert not os.path.exists(f"{request.output}.part")
    return caught.value


def test_one_plan_is_built_for_several_gpus_that_are_not_present(rtx: Worker, tmp_path: Path) -> None:
    request = backend_graphs.build_request(
        backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx"), tmp_path / "add.plan", gpu="sm75,sm86,sm89,sm120"
    )
    built = BACKEND.build(request, SilentProgress(), worker=rtx)
    plan = (tmp_path / "add.plan").read_bytes()
    assert built.path == request.output
    assert built.target_names == ("sm75", "sm86", "sm89", "sm120")
    assert (built.sha256, built.size_bytes) == (hashlib.sha256(plan).hexdigest(), len(plan))
    assert built.backend_version == BACKEND.probe().version
    assert os.listdir(tmp_path).count("add.plan.part") == 0
    single = BACKEND.build(
        backend_graphs.build_request(request.onnx_path, tmp_path / "single.plan"), SilentProgress(), worker=rtx
    )
    assert single.size_bytes < built.size_bytes


def test_a_build_without_a_worker_uses_a_new_child_process(tmp_path: Path) -> None:
    request = backend_graphs.build_request(
        backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx"), tmp_path / "add.plan"
    )
    assert BACKEND.build(request, SilentProgress()).size_bytes > 1000


def test_several_profiles_make_one_engine(rtx: Worker, tmp_path: Path) -> None:
    profiles = (backend_graphs.ROWS_PROFILE, backend_graphs.profile(x=((9, 4), (16, 4), (64, 4))))
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert BACKEND.build(
        backend_graphs.build_request(path, tmp_path / "add.plan", profiles=profiles), SilentProgress(), worker=rtx
    ).size_bytes


@pytest.mark.parametrize("queries", ["S", "1"])
def test_the_report_shows_a_fused_attention(queries: str, rtx: Worker, tmp_path: Path) -> None:
    shapes = ((1, 8, 16, 64), (2, 8, 64, 64), (4, 8, 128, 64))
    query = shapes if queries == "S" else ((1, 8, 1, 64), (2, 8, 1, 64), (4, 8, 1, 64))
    path = backend_graphs.save_graph(backend_graphs.attention_text(queries), tmp_path / "a.onnx")
    request = backend_graphs.build_request(
        path, tmp_path / "a.plan", gpu="sm86,sm89,sm120", profiles=(backend_graphs.profile(q=query, k=shapes, v=shapes),)
    )
    layers = BACKEND.build(request, SilentProgress(), worker=rtx).layers
    assert layers is not None
    assert layers.source == "builder log"
    assert [(fusion.fused, fusion.nodes) for fusion in layers.attentions] == [(True, ("attend",))]
    assert layers.attentions[0].kernel.startswith("_gemm_mha" if queries == "S" else "_gemv_mha")
    assert layers.dtype_fraction("float16") == 1.0


def test_an_attention_without_a_fused_kernel_is_reported_with_its_node_and_the_pass_to_run(rtx: Worker, tmp_path: Path) -> None:
    shapes = ((1, 8, 16, 64), (2, 8, 64, 64), (4, 8, 128, 64))
    path = backend_graphs.save_graph(backend_graphs.attention_text("S", "float"), tmp_path / "a.onnx")
    request = backend_graphs.build_request(
        path, tmp_path / "a.plan", profiles=(backend_graphs.profile(q=shapes, k=shapes, v=shapes),)
    )
    error = build_failure(rtx, request)
    assert "at node `attend` [Attention]: Attention operation was not supported by a dedicated kernel" in error.message
    assert error.hint is not None
    assert "`attention`" in error.hint


def test_without_profiling_verbosity_there_is_no_layer_report(rtx: Worker, tmp_path: Path) -> None:
    options = parse_options("tensorrt-rtx", {"profilingVerbosity": "none"})
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert (
        BACKEND.build(
            backend_graphs.build_request(path, tmp_path / "a.plan", options=options), SilentProgress(), worker=rtx
        ).layers
        is None
    )


SUPPORTED_OPTIONS = {
    "builderOptimizationLevel": "4",
    "memPoolSize": "workspace:512,tacticSharedMem:48K",
    "allowWeightStreaming": "",
    "sparsity": "enable",
    "noTF32": "",
    "maxAuxStreams": "1",
    "tilingOptimizationLevel": "2",
    "l2LimitForTiling": "1048576",
    "maxTactics": "8",
    "avgTiming": "2",
    "profilingVerbosity": "layer_names_only",
    "tacticSources": "-JIT_CONVOLUTIONS,+EDGE_MASK_CONVOLUTIONS",
    "preview": "+runtimeActivationResize,-aliasedPluginIO1003",
    "distributiveIndependence": "",
    "directIO": "",
}


@pytest.mark.parametrize(("name", "value"), SUPPORTED_OPTIONS.items())
def test_each_supported_option_builds(name: str, value: str, rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    request = backend_graphs.build_request(path, tmp_path / "a.plan", options=parse_options("tensorrt-rtx", {name: value}))
    assert BACKEND.build(request, SilentProgress(), worker=rtx).size_bytes


CONVOLUTION = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1,16,8,8] x) => (float[1,16,8,8] y) <int64[4] shape = {16,16,3,3}> {
  w = ConstantOfShape (shape)  h = Conv <pads = [1,1,1,1]> (x, w)  y = Relu (h) }
"""


def test_an_option_reaches_the_builder(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(CONVOLUTION, tmp_path / "conv.onnx")
    options = parse_options("tensorrt-rtx", {"memPoolSize": "workspace:1B"})
    error = build_failure(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=(), options=options))
    assert "workspace limit" in error.message


def test_external_weights_and_non_ascii_paths_are_supported(rtx: Worker, tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner — 模型\nзвёзды"
    folder.mkdir()
    path = backend_graphs.save_with_external_weight(folder / "модель ü.onnx")
    row_profile = backend_graphs.profile(x=((1, 64), (2, 64), (8, 64)))
    assert BACKEND.build(
        backend_graphs.build_request(path, folder / "план.plan", profiles=(row_profile,)), SilentProgress(), worker=rtx
    ).size_bytes


def test_missing_weights_are_rejected(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_with_external_weight(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    assert (
        "cannot read the graph: Failed to import initializer: w"
        in build_failure(rtx, backend_graphs.build_request(path, tmp_path / "m.plan", profiles=())).message
    )


@pytest.mark.parametrize("keep", [0, 40, 0.9])
def test_a_truncated_graph_is_rejected(keep: float, rtx: Worker, tmp_path: Path) -> None:
    path = tmp_path / "add.onnx"
    content = Path(backend_graphs.save_graph(backend_graphs.ADD, path)).read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    assert "TensorRT-RTX" in build_failure(rtx, backend_graphs.build_request(str(path), tmp_path / "a.plan")).message


def test_a_missing_graph_is_rejected(rtx: Worker, tmp_path: Path) -> None:
    assert (
        "cannot read"
        in build_failure(rtx, backend_graphs.build_request(str(tmp_path / "none.onnx"), tmp_path / "a.plan")).message
    )


def test_a_parser_crash_is_an_error_that_names_the_node_and_the_worker_continues(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.CRASHES_THE_PARSER, tmp_path / "crash.onnx")
    error = build_failure(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=()))
    assert "`tensorrt-rtx` crashed with SIGSEGV while parsing node `poison` [MyelinWeightsTransformPlugin]" in error.message
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert BACKEND.build(backend_graphs.build_request(path, tmp_path / "a.plan"), SilentProgress(), worker=rtx).size_bytes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            '(int32[2] x, int32[2] s) => (int32[2] y) { [shift] y = BitShift <direction = "LEFT"> (x, s) }',
            "does not support node `shift` [BitShift]",
        ),
        (
            "(int16[2] x) => (int16[2] y) { [add] y = Add (x, x) }",
            "does not support the type of input `x` (int16), at node `add` [Add]",
        ),
        (
            "(seq(float[N]) items, int64 i) => (float[N] y) { [pick] y = SequenceAt (items, i) }",
            "does not support the type of input `items` (sequence), at node `pick` [SequenceAt]",
        ),
        (
            "(float[1,1,9,9] x) => (float[1,1,6,6] y) { [pool] y = MaxPool <kernel_shape = [2,2], dilations = [2,2]> (x) }",
            "rejects node `pool` [MaxPool]: This version of TensorRT does not support dilations other than 1.",
        ),
        (
            "(float[4] x, int64[2] shape) => (float[A,B] y) { [reshape] y = Reshape (x, shape) }",
            "needs the values of the input `shape` at build time because they are sizes, at node `reshape` [Reshape]",
        ),
    ],
)
def test_a_build_error_names_the_node_the_op_type_and_the_reason(body: str, message: str, rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(f'<ir_version: 10, opset_import: ["" : 21]> g {body}', tmp_path / "g.onnx")
    assert message in build_failure(rtx, backend_graphs.build_request(path, tmp_path / "g.plan", profiles=())).message


def test_a_grouped_attention_names_the_pass_that_replaces_it(rtx: Worker, tmp_path: Path) -> None:
    graph = backend_graphs.save_graph(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1,1,32] q, float[1,1,16] k, float[1,2,3,8] pk, float[1,2,3,8] pv, int32[1] n, int32[1] t)
            => (float[1,1,32] y, float[1,2,4,8] nk, float[1,2,4,8] nv) {
            y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, k, pk, pv, n, t)
        }""",
        tmp_path / "g.onnx",
    )
    error = build_failure(rtx, backend_graphs.build_request(graph, tmp_path / "g.plan", profiles=()))
    assert "[GroupQueryAttention]" in error.message
    assert error.hint is not None
    assert "--passes 'kv-static{capacity=4096}'" in error.hint


def test_a_dynamic_input_without_a_profile_is_named(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert (
        "the input `x` has a dynamic shape"
        in build_failure(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=())).message
    )


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("cpu", "does not build for the CPU"),
        ("sm90", "does not build for `sm90` on this machine"),
        ("sm89@linux,sm86@windows", "one plan supports one operating system"),
        ("sm89@windows", "does not support building engines on platforms other than Linux"),
    ],
)
def test_an_unsupported_target_is_rejected(gpu: str, message: str, rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert message in build_failure(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", gpu=gpu)).message


def test_a_full_disk_is_an_error_and_leaves_no_file(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    (tmp_path / "a.plan.part").symlink_to("/dev/full")
    with pytest.raises(RyzenError, match="the engine cannot be written: .*No space left on device") as caught:
        BACKEND.build(backend_graphs.build_request(path, tmp_path / "a.plan"), SilentProgress(), worker=rtx)
    assert not isinstance(caught.value, BackendError), "a full disk is independent of the graph and the target"
    assert os.listdir(tmp_path) == ["add.onnx"]


def test_opening_an_engine_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="needs an NVIDIA GPU, and no NVIDIA driver was found"):
        with BACKEND.open(str(tmp_path / "a.plan")):
            pass


def test_capabilities_include_the_features_that_were_never_executed() -> None:
    capabilities = BACKEND.probe()
    assert capabilities.available
    assert capabilities.sms == (75, 80, 86, 89, 120, 121)
    assert not capabilities.can_run
    assert any("running an engine" in feature for feature in capabilities.not_executed)


def test_the_supported_compute_capabilities_are_those_of_the_library() -> None:
    trt = BACKEND.load_bindings()
    listed = {int(name.removeprefix("SM")) for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(BACKEND.sms()) == listed


def test_bindings_without_libraries_count_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.endswith("_libs") else object())
    capabilities = BACKEND.probe()
    assert not capabilities.available
    assert capabilities.message == "TensorRT-RTX is not available: only tensorrt_rtx_bindings is installed"
    assert capabilities.install_hint == "pip install 'ryzen-compile[rtx]'"


def test_contradictory_shapes_are_reported_with_the_node(rtx: Worker, tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    sum (float[N] x, float[M] y) => (float[K] z) { [both] z = Add (x, y) }
    """
    path = backend_graphs.save_graph(text, tmp_path / "sum.onnx")
    profile = Profile(min={"x": (2,), "y": (2,)}, opt={"x": (4,), "y": (5,)}, max={"x": (8,), "y": (8,)})
    error = build_failure(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=(profile,)))
    assert "at node `both` [Add]" in error.message
    assert "kOPT values for profile 0 violate shape constraints" in error.message
    assert error.message.endswith("5 != 4.")
    assert error.hint == "the shapes contradict each other: give consistent --min-shapes, --opt-shapes and --max-shapes"


def test_shapes_at_which_one_branch_does_not_run_are_named_so(rtx: Worker, tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    branches (float[N] x, bool flag) => (float[M] y) {
        y = If (flag) <
            then_branch = t () => (float[A] p) { index = Constant <value_ints = [5]> ()  [pick] p = Gather (x, index) },
            else_branch = e () => (float[B] q) {
                starts = Constant <value_ints = [150]> ()  ends = Constant <value_ints = [999]> ()
                rest = Slice (x, starts, ends)  first = Constant <value_ints = [0]> ()  [late] q = Gather (rest, first) }>
    }
    """
    path = backend_graphs.save_graph(text, tmp_path / "branches.onnx")
    shapes = {"x": (128,), "flag": ()}
    profile = Profile(min=shapes, opt=shapes, max=shapes)
    error = build_failure(rtx, backend_graphs.build_request(path, tmp_path / "b.plan", profiles=(profile,)))
    assert error.hint is not None
    assert error.hint.startswith("both branches of an If must run at the shapes: ")
    assert "--min-shapes" in error.hint


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            "q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z)",
            "rejects node `.*` .QuantizeLinear.: Non-zero zero point is not supported",
        ),
        (
            "i = Cast <to = 3> (x)  m = MatMulInteger (i, i)  y = Cast <to = 1> (m)",
            "does not support node `.*` .MatMulInteger.",
        ),
        (
            "y = com.microsoft.MatMulNBits <K = 4, N = 4, bits = 4, block_size = 16> (x, b, t)",
            "(rejects|does not support) node `.*` .MatMulNBits.",
        ),
    ],
)
def test_a_refused_quantized_node_names_the_unquantized_model_and_no_other_hardware(
    nodes: str, message: str, rtx: Worker, tmp_path: Path
) -> None:
    graph = backend_graphs.save_graph(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[4,4] x) => (float[4,4] y) '
        "<float s = {0.1}, int8 z = {3}, float[4,1] t = {1, 1, 1, 1}, "
        f"uint8[4,1,8] b = {{{', '.join(['136'] * 32)}}}> {{ {nodes} }}",
        tmp_path / "g.onnx",
    )
    error = build_failure(rtx, backend_graphs.build_request(graph, tmp_path / "g.plan", profiles=()))
    assert re.search(message, error.message)
    assert "DLA" not in str(error)
    assert error.hint == "build the model before it was quantized"
