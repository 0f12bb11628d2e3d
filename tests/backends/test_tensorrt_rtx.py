"""Real builds: TensorRT-RTX compiles here for GPUs that are not."""

from __future__ import annotations

import hashlib
import os
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
    with worker.start_worker("tensorrt-rtx") as started:
        yield started


def refusal(rtx: Worker, request: BuildRequest) -> BackendError:
    with pytest.raises(BackendError) as caught:
        BACKEND.build(request, SilentProgress(), worker=rtx)
    assert not os.path.exists(request.output)
    assert not os.path.exists(f"{request.output}.part")
    return caught.value


def test_one_plan_is_built_for_several_gpus_that_are_not_here(rtx: Worker, tmp_path: Path) -> None:
    request = backend_graphs.build_request(
        backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx"), tmp_path / "add.plan", gpu="sm75,sm86,sm89,sm120"
    )
    built = BACKEND.build(request, SilentProgress(), worker=rtx)
    plan = (tmp_path / "add.plan").read_bytes()
    assert built.path == request.output
    assert built.targets == ("sm75", "sm86", "sm89", "sm120")
    assert (built.sha256, built.size_bytes) == (hashlib.sha256(plan).hexdigest(), len(plan))
    assert built.backend_version == BACKEND.probe().version
    assert os.listdir(tmp_path).count("add.plan.part") == 0
    one = BACKEND.build(backend_graphs.build_request(request.onnx_path, tmp_path / "one.plan"), SilentProgress(), worker=rtx)
    assert one.size_bytes < built.size_bytes


def test_a_build_without_a_worker_starts_and_ends_its_own(tmp_path: Path) -> None:
    request = backend_graphs.build_request(
        backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx"), tmp_path / "add.plan"
    )
    assert BACKEND.build(request, SilentProgress()).size_bytes > 1000


def test_several_profiles_make_one_engine(rtx: Worker, tmp_path: Path) -> None:
    more = (backend_graphs.ROWS_PROFILE, backend_graphs.profile(x=((9, 4), (16, 4), (64, 4))))
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert BACKEND.build(
        backend_graphs.build_request(path, tmp_path / "add.plan", profiles=more), SilentProgress(), worker=rtx
    ).size_bytes


@pytest.mark.parametrize("queries", ["S", "1"])
def test_the_report_shows_a_fused_attention(queries: str, rtx: Worker, tmp_path: Path) -> None:
    rows = ((1, 8, 16, 64), (2, 8, 64, 64), (4, 8, 128, 64))
    query = rows if queries == "S" else ((1, 8, 1, 64), (2, 8, 1, 64), (4, 8, 1, 64))
    path = backend_graphs.save_graph(backend_graphs.attention_text(queries), tmp_path / "a.onnx")
    request = backend_graphs.build_request(
        path, tmp_path / "a.plan", gpu="sm86,sm89,sm120", profiles=(backend_graphs.profile(q=query, k=rows, v=rows),)
    )
    layers = BACKEND.build(request, SilentProgress(), worker=rtx).layers
    assert layers is not None
    assert layers.source == "builder log"
    assert [(fusion.fused, fusion.nodes) for fusion in layers.attentions] == [(True, ("attend",))]
    assert layers.attentions[0].kernel.startswith("_gemm_mha" if queries == "S" else "_gemv_mha")
    assert layers.dtype_fraction("float16") == 1.0


def test_an_attention_without_a_kernel_is_refused_by_its_node_with_the_pass_that_helps(rtx: Worker, tmp_path: Path) -> None:
    rows = ((1, 8, 16, 64), (2, 8, 64, 64), (4, 8, 128, 64))
    path = backend_graphs.save_graph(backend_graphs.attention_text("S", "float"), tmp_path / "a.onnx")
    request = backend_graphs.build_request(
        path, tmp_path / "a.plan", profiles=(backend_graphs.profile(q=rows, k=rows, v=rows),)
    )
    error = refusal(rtx, request)
    assert "at node `attend` [Attention]: Attention operation was not supported by a dedicated kernel" in error.message
    assert error.hint is not None
    assert "`attention`" in error.hint


def test_detail_that_is_switched_off_leaves_no_report(rtx: Worker, tmp_path: Path) -> None:
    options = parse_options("tensorrt-rtx", {"profilingVerbosity": "none"})
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert (
        BACKEND.build(
            backend_graphs.build_request(path, tmp_path / "a.plan", options=options), SilentProgress(), worker=rtx
        ).layers
        is None
    )


EVERY_OPTION = {
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


@pytest.mark.parametrize(("name", "value"), EVERY_OPTION.items())
def test_each_option_that_is_taken_builds(name: str, value: str, rtx: Worker, tmp_path: Path) -> None:
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
    error = refusal(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=(), options=options))
    assert "workspace limit" in error.message


def test_weights_beside_the_graph_and_names_in_any_script_are_read(rtx: Worker, tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner — 模型\nзвёзды"
    folder.mkdir()
    path = backend_graphs.save_with_external_weight(folder / "модель ü.onnx")
    rows = backend_graphs.profile(x=((1, 64), (2, 64), (8, 64)))
    assert BACKEND.build(
        backend_graphs.build_request(path, folder / "план.plan", profiles=(rows,)), SilentProgress(), worker=rtx
    ).size_bytes


def test_missing_weights_are_refused(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_with_external_weight(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    assert (
        "cannot read the graph: Failed to import initializer: w"
        in refusal(rtx, backend_graphs.build_request(path, tmp_path / "m.plan", profiles=())).message
    )


@pytest.mark.parametrize("keep", [0, 40, 0.9])
def test_a_truncated_graph_is_refused(keep: float, rtx: Worker, tmp_path: Path) -> None:
    path = tmp_path / "add.onnx"
    whole = Path(backend_graphs.save_graph(backend_graphs.ADD, path)).read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    assert "TensorRT-RTX" in refusal(rtx, backend_graphs.build_request(str(path), tmp_path / "a.plan")).message


def test_a_graph_that_is_not_there_is_refused(rtx: Worker, tmp_path: Path) -> None:
    assert "cannot read" in refusal(rtx, backend_graphs.build_request(str(tmp_path / "none.onnx"), tmp_path / "a.plan")).message


def test_a_parser_that_crashes_is_an_error_that_names_the_node_and_the_worker_goes_on(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.CRASHES_THE_PARSER, tmp_path / "crash.onnx")
    error = refusal(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=()))
    assert "`tensorrt-rtx` died of SIGSEGV while parsing node `poison` [MyelinWeightsTransformPlugin]" in error.message
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert BACKEND.build(backend_graphs.build_request(path, tmp_path / "a.plan"), SilentProgress(), worker=rtx).size_bytes


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            '(int32[2] x, int32[2] s) => (int32[2] y) { [shift] y = BitShift <direction = "LEFT"> (x, s) }',
            "does not know node `shift` [BitShift]",
        ),
        (
            "(int16[2] x) => (int16[2] y) { [add] y = Add (x, x) }",
            "does not know the type of input `x` (int16), at node `add` [Add]",
        ),
        (
            "(seq(float[N]) items, int64 i) => (float[N] y) { [pick] y = SequenceAt (items, i) }",
            "does not know the type of input `items` (sequence), at node `pick` [SequenceAt]",
        ),
        (
            "(float[1,1,9,9] x) => (float[1,1,6,6] y) { [pool] y = MaxPool <kernel_shape = [2,2], dilations = [2,2]> (x) }",
            "refuses node `pool` [MaxPool]: This version of TensorRT does not support dilations other than 1.",
        ),
        (
            "(float[4] x, int64[2] shape) => (float[A,B] y) { [reshape] y = Reshape (x, shape) }",
            "needs to know the values of the input `shape`, which are sizes, at node `reshape` [Reshape]",
        ),
    ],
)
def test_a_refusal_names_the_node_the_op_and_the_reason(body: str, says: str, rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(f'<ir_version: 10, opset_import: ["" : 21]> g {body}', tmp_path / "g.onnx")
    assert says in refusal(rtx, backend_graphs.build_request(path, tmp_path / "g.plan", profiles=())).message


def test_a_dynamic_input_without_a_profile_is_refused_by_name(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert (
        "the input `x` has a dynamic shape"
        in refusal(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=())).message
    )


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        ("cpu", "does not build for the CPU"),
        ("sm90", "does not build for `sm90` here"),
        ("sm89@linux,sm86@windows", "one plan is for one operating system"),
        ("sm89@windows", "does not support building engines on platforms other than Linux"),
    ],
)
def test_a_target_that_it_cannot_build_for_is_refused(gpu: str, says: str, rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    assert says in refusal(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", gpu=gpu)).message


def test_a_full_disk_is_an_error_and_leaves_nothing(rtx: Worker, tmp_path: Path) -> None:
    path = backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")
    (tmp_path / "a.plan.part").symlink_to("/dev/full")
    with pytest.raises(RyzenError, match="the engine cannot be written: .*No space left on device") as caught:
        BACKEND.build(backend_graphs.build_request(path, tmp_path / "a.plan"), SilentProgress(), worker=rtx)
    assert not isinstance(caught.value, BackendError), "a full disk says nothing about the graph or the target"
    assert os.listdir(tmp_path) == ["add.onnx"]


def test_an_engine_cannot_be_opened_without_a_gpu_and_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="needs an NVIDIA GPU and its driver, and there is none here"):
        with BACKEND.open(str(tmp_path / "a.plan")):
            pass


def test_it_says_what_it_can_do_here_and_what_was_never_executed() -> None:
    found = BACKEND.probe()
    assert found.available
    assert found.sms == (75, 80, 86, 89, 120, 121)
    assert not found.can_run
    assert any("running an engine" in what for what in found.not_executed)


def test_what_it_can_build_for_is_what_the_library_lists() -> None:
    trt = BACKEND.load_bindings()
    listed = {int(name.removeprefix("SM")) for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(BACKEND.sms()) == listed


def test_bindings_without_libraries_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.endswith("_libs") else object())
    found = BACKEND.probe()
    assert not found.available
    assert found.message == "there is no TensorRT-RTX here: only tensorrt_rtx_bindings is installed"
    assert found.install_hint == "pip install 'ryzen-compile[rtx]'"


def test_shapes_that_do_not_go_together_are_told_with_the_node(rtx: Worker, tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    sum (float[N] x, float[M] y) => (float[K] z) { [both] z = Add (x, y) }
    """
    path = backend_graphs.save_graph(text, tmp_path / "sum.onnx")
    profile = Profile(min={"x": (2,), "y": (2,)}, opt={"x": (4,), "y": (5,)}, max={"x": (8,), "y": (8,)})
    error = refusal(rtx, backend_graphs.build_request(path, tmp_path / "a.plan", profiles=(profile,)))
    assert "at node `both` [Add]" in error.message
    assert "kOPT values for profile 0 violate shape constraints" in error.message
    assert error.message.endswith("5 != 4.")
    assert error.hint is not None
    assert "--min-shapes" in error.hint
