"""The backend `onnxruntime`: builds, sessions, input validation and errors."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from support import backend_graphs

from ryzen_compile.backends.onnxruntime import quantized_weights
from ryzen_compile.backends.onnxruntime.backend import BACKEND, OnnxRuntime
from ryzen_compile.backends.onnxruntime.transposed_weights import max_folded_bytes
from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.progress import SilentProgress
from ryzen_compile.spec.interface import TensorSpec


def model_text(body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 21]> g {body}'


@pytest.fixture
def add(tmp_path: Path) -> str:
    return backend_graphs.save_graph(backend_graphs.ADD, tmp_path / "add.onnx")


def test_building_verifies_the_graph_and_returns_the_graph_itself(add: str, tmp_path: Path) -> None:
    built = BACKEND.build(backend_graphs.build_request(add, tmp_path / "nothing", gpu="cpu"), SilentProgress())
    assert built.path == add
    assert built.size_bytes == Path(add).stat().st_size
    assert built.backend_version == BACKEND.probe().version
    assert [path.name for path in tmp_path.iterdir()] == ["add.onnx"]


def test_an_unknown_op_is_named(tmp_path: Path) -> None:
    unknown = model_text("(float[2] x) => (float[2] y) { [odd] y = any.Thing (x) }").replace("21]", '21, "any" : 1]')
    path = backend_graphs.save_graph(unknown, tmp_path / "g.onnx")
    with pytest.raises(BackendError, match="Thing"):
        BACKEND.build(backend_graphs.build_request(path, tmp_path / "x", gpu="cpu"), SilentProgress())
    with pytest.raises(BackendError, match="Thing"):
        with BACKEND.open(path):
            pass


def test_error_messages_contain_no_source_location(tmp_path: Path) -> None:
    newer = backend_graphs.save_graph(re.sub(r'"" : \d+', '"" : 99', backend_graphs.ADD), tmp_path / "g.onnx")
    with pytest.raises(BackendError) as caught:
        BACKEND.build(backend_graphs.build_request(newer, tmp_path / "x", gpu="cpu"), SilentProgress())
    assert re.match(r"ONNX Runtime refuses `.*/g.onnx`: .*Opset 99", caught.value.message)
    assert "onnxruntime_src" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_a_file_that_is_not_a_model_is_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BackendError, match="m.onnx"):
        BACKEND.build(backend_graphs.build_request(str(path), tmp_path / "x", gpu="cpu"), SilentProgress())


def test_a_gpu_that_is_not_present_is_rejected(add: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot run on `sm89` on this machine"):
        BACKEND.build(backend_graphs.build_request(add, tmp_path / "x", gpu="sm89"), SilentProgress())
    with pytest.raises(BackendError, match="ONNX Runtime found no GPU that it can use on this machine"):
        with OnnxRuntime(device="cuda").open(add):
            pass


def test_warnings_of_the_library_are_returned_and_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong_shape = model_text("(float[N,4] x) => (float[3,5] y) { h = Identity (x)  y = Flatten (h) }")
    path = backend_graphs.save_graph(wrong_shape, tmp_path / "g.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    onnx.save(model, path)
    built = BACKEND.build(backend_graphs.build_request(path, tmp_path / "x", gpu="cpu"), SilentProgress())
    assert any("unused" in warning for warning in built.warnings)
    with BACKEND.open(path) as session:
        session.run({"x": np.ones((2, 4), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_inputs_and_outputs_are_described(tmp_path: Path) -> None:
    path = backend_graphs.save_graph(
        model_text("(float[N,4] a, int64 b, float16[2] c, bool[M] d) => (float[N,4] e) { e = Identity (a) }"), tmp_path / "g"
    )
    with BACKEND.open(path) as session:
        assert session.inputs == (
            TensorSpec(name="a", dtype="float32", dims=("N", 4)),
            TensorSpec(name="b", dtype="int64", dims=None),  # like a tensor of any rank
            TensorSpec(name="c", dtype="float16", dims=(2,)),
            TensorSpec(name="d", dtype="bool", dims=("M",)),
        )
        assert session.outputs == (TensorSpec(name="e", dtype="float32", dims=("N", 4)),)


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ({}, r"missing inputs: x: float32\[N, 4\]", "pass a tensor for every input"),
        ({"x": np.ones((2, 4), np.float32), "z": 1}, "there is no input `z`", "`x`"),
        ({"xx": np.ones((2, 4), np.float32)}, "there is no input `xx`", "did you mean `x`"),
        ({"x": np.ones((2, 4))}, "`x` is float64, expected float32", 'astype\\("float32"\\)'),
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, "`x` is int32, expected float32", r"x\.to\(torch\.float32\)"),
        ({"x": np.ones((2, 4, 1), np.float32)}, "`x` has 3 dimensions, expected 2", None),
        ({"x": np.ones((2, 5), np.float32)}, "`x` has size 5 along axis 1, expected 4", None),
        ({"x": torch.ones(2, 4, requires_grad=True)}, "`x` cannot be read through DLPack", r"x\.detach\(\)"),
        ({"x": [["a"]]}, "`x` cannot be read as float32", None),
        ({"x": [torch.ones(4, requires_grad=True)]}, "`x` cannot be read as float32", None),
    ],
)
def test_inputs_that_do_not_match_are_rejected_by_name(
    inputs: dict[str, np.ndarray], message: str, hint: str | None, add: str
) -> None:
    with BACKEND.open(add) as session, pytest.raises(ShapeError, match=message) as caught:
        session.run(inputs)
    if hint:
        assert caught.value.hint is not None
        assert re.search(hint, caught.value.hint)


def test_arrays_tensors_and_lists_are_supported(add: str) -> None:
    expected = np.full((2, 4), 2, np.float32)
    with BACKEND.open(add) as session:
        for value in (np.ones((2, 4), np.float32), torch.ones(2, 4), torch.ones(4, 2).T, [[1, 1, 1, 1], [1, 1, 1, 1]]):
            np.testing.assert_array_equal(session.run({"x": value})["y"], expected)  # type: ignore[dict-item]


def test_arrays_of_another_byte_order_are_converted_also_in_sequences(add: str, tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    swapped = values.astype(values.dtype.newbyteorder())
    assert not swapped.dtype.isnative
    with BACKEND.open(add) as session:
        np.testing.assert_array_equal(session.run({"x": swapped})["y"], 2 * values)
    path = backend_graphs.save_graph(
        model_text("(seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence <axis = 0> (x) }"), tmp_path / "q.onnx"
    )
    with BACKEND.open(path) as session:
        np.testing.assert_array_equal(session.run({"x": [swapped[0], values[1]]})["y"], values.ravel())  # type: ignore[dict-item]


def test_a_tensor_on_the_cpu_is_not_copied() -> None:
    from ryzen_compile.backends.input_validation import to_host_array

    spec = TensorSpec(name="x", dtype="float32", dims=("N",))
    tensor = torch.zeros(4)
    array = to_host_array(tensor, spec)
    tensor[0] = 7
    assert array[0] == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_numpy_lacks_are_supported(dtype: str, tmp_path: Path) -> None:
    element = {"float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}.get(dtype, dtype)
    path = backend_graphs.save_graph(
        model_text(f"({element}[N] x) => ({element}[N] y) {{ y = Identity (x) }}"), tmp_path / "g.onnx"
    )
    values = np.array([1, -2, 0.5, 448], getattr(ml_dtypes, dtype))
    with BACKEND.open(path) as session:
        y = session.run({"x": values})["y"]
        assert y.dtype == values.dtype
        np.testing.assert_array_equal(y.view(np.uint8), values.view(np.uint8))
        if dtype == "bfloat16":
            y_of_torch = session.run({"x": torch.tensor([1, -2, 0.5, 448], dtype=torch.bfloat16)})["y"]  # type: ignore[dict-item]
            np.testing.assert_array_equal(y_of_torch.view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
def test_types_that_numpy_lacks_keep_their_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    dims = ",".join(map(str, shape))
    types = [f"{element}[{dims}]" if shape else element for element in ("bfloat16", "float")]
    body = f"({types[0]} x) => ({types[0]} same, {types[1]} wider) {{ same = Identity (x)  wider = Cast <to = 1> (x) }}"
    values = np.full(shape, 1.5, ml_dtypes.bfloat16)
    with BACKEND.open(backend_graphs.save_graph(model_text(body), tmp_path / "g.onnx")) as session:
        outputs = session.run({"x": values})
    assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
        "same": (shape, "bfloat16"),
        "wider": (shape, "float32"),
    }
    assert all((array == 1.5).all() for array in outputs.values())


def test_strings_and_sequences_are_supported(tmp_path: Path) -> None:
    path = backend_graphs.save_graph(model_text("(string[N] x) => (string[N] y) { y = Identity (x) }"), tmp_path / "s.onnx")
    with BACKEND.open(path) as session:
        assert session.run({"x": np.array(["a", "ü"], object)})["y"].tolist() == ["a", "ü"]
        assert session.run({"x": ["a"]})["y"].tolist() == ["a"]  # type: ignore[dict-item]
        with pytest.raises(ShapeError, match="expected strings"):
            session.run({"x": np.ones(2)})
    path = backend_graphs.save_graph(
        model_text("(seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence <axis = 0> (x) }"), tmp_path / "q.onnx"
    )
    with BACKEND.open(path) as session:
        assert session.inputs[0].dims is None
        assert session.run({"x": [np.ones(2, np.float32), np.zeros(1, np.float32)]})["y"].tolist() == [1, 1, 0]  # type: ignore[dict-item]


def test_a_failing_node_is_named_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = backend_graphs.save_graph(
        model_text("(float[4] x, int64[N] i) => (float[N] y) { [pick] y = Gather (x, i) }"), tmp_path / "g.onnx"
    )
    with (
        BACKEND.open(path) as session,
        pytest.raises(BackendError, match="Gather `pick` failed: indices element out of data bounds"),
    ):
        session.run({"x": np.ones(4, np.float32), "i": np.array([9])})
    assert capfd.readouterr() == ("", "")


def test_several_threads_may_run_concurrently(add: str) -> None:
    failures = []

    def run_repeatedly(number: int) -> None:
        for _ in range(50):
            y = session.run({"x": np.full((3, 4), number, np.float32)})["y"]
            if not np.array_equal(y, np.full((3, 4), 2 * number, np.float32)):
                failures.append(number)

    with BACKEND.open(add) as session:
        threads = [threading.Thread(target=run_repeatedly, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_closed_session_is_an_error(add: str) -> None:
    with BACKEND.open(add) as session:
        pass
    with pytest.raises(BackendError, match="is closed"):
        session.run({"x": np.ones((1, 4), np.float32)})


def test_without_the_package_the_install_command_is_reported(monkeypatch: pytest.MonkeyPatch, add: str) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    capabilities = BACKEND.probe()
    assert not capabilities.available
    assert capabilities.install_hint is not None
    assert "ryzen-compile[cpu]" in capabilities.install_hint
    with pytest.raises(BackendError, match="cannot be imported"):
        with BACKEND.open(add):
            pass


TIED = (1 << 12, 1 << 10)
"""The shape of a weight of 16 MB, an embedding of 4,096 ids."""


def save_tied(path: Path, body: str, shape: tuple[int, int] = TIED) -> str:
    """Save a graph whose ids select rows of the weight `w`, and whose output `y` is computed by `body` from these rows."""
    rows = f"{shape[0]},{shape[1]}"
    model = onnx.parser.parse_model(
        model_text(f"(int64[n] ids) => (float[n,{shape[0]}] y) <float[{rows}] w> {{ x = Gather (w, ids) {body} }}")
    )
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del model.graph.value_info[:]
    onnx.save(model, path, save_as_external_data=True, location="w.data")
    return str(path)


def anonymous_bytes() -> int:
    """Return the memory of this process that is not mapped from files."""
    fields = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return next(int(field[1]) * 1024 for field in fields if field[0] == "Anonymous:")


def mapped_bytes(path: Path) -> int:
    """Return the bytes of this process that are mapped from the file `path`."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_weights_are_not_copied(tmp_path: Path) -> None:
    path = save_tied(tmp_path / "tied.onnx", "t = Transpose (w) y = MatMul (x, t)")
    inputs = {"ids": np.arange(3)}
    with BACKEND.open(path) as session:
        expected = session.run(inputs)["y"]
    max_folded_bytes(path)  # imports what reads graphs
    before = anonymous_bytes()
    with BACKEND.open(path, map_weights=True) as session:
        assert anonymous_bytes() - before < 8 << 20
        assert mapped_bytes(tmp_path / "w.data") >= 16 << 20
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        ("t = Transpose (w) y = MatMul (x, t)", TIED, (16 << 20) - 1),
        ("t = Transpose (w) y = MatMul (x, t)", (1 << 11, 1 << 10), None),
        ("h = Abs (w) t = Transpose (h) y = MatMul (x, t)", TIED, None),
        ("t = Transpose (w) h = Abs (t) y = MatMul (x, h)", TIED, None),
        ("y = Gemm <transB=1> (x, w)", TIED, None),
    ],
)
def test_results_on_large_weights_are_computed_at_load_unless_only_transposed(
    body: str, shape: tuple[int, int], expected: int | None, tmp_path: Path
) -> None:
    assert max_folded_bytes(save_tied(tmp_path / "tied.onnx", body, shape)) == expected


def run_script(script: str, *arguments: str | Path) -> str:
    """Return what `script` prints in a process of its own, whose heap holds nothing of other tests."""
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    command, environment = [sys.executable, "-c", script, *map(str, arguments)], {**os.environ, "PYTHONPATH": folders}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


CHECK_SCRIPT = """
import sys
from pathlib import Path
from ryzen_compile.backends.onnxruntime.backend import SessionChecker
from support import backend_graphs

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def check(path):
    request = backend_graphs.build_request(path, Path("nothing"), gpu="cpu")
    SessionChecker().build(request, "nothing", NoBreadcrumb(), NoOutput())

class NoBreadcrumb:
    def write(self, text):
        pass

class NoOutput:
    def lines(self):
        return []

check(sys.argv[1])
before = peak()
check(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="weights are mapped")
def test_checking_a_graph_does_not_copy_its_weights(tmp_path: Path) -> None:
    body = "t = Transpose (w) y = MatMul (x, t)"
    (tmp_path / "small").mkdir()
    small, large = (
        save_tied(tmp_path / "small" / "g.onnx", body, (8, 1024)),
        save_tied(tmp_path / "g.onnx", body, (1 << 14, 1024)),
    )
    assert int(run_script(CHECK_SCRIPT, small, large)) < 32e6  # of 64 MB
    built = BACKEND.build(backend_graphs.build_request(large, tmp_path / "nothing", gpu="cpu"), SilentProgress())
    assert built.warnings == ()


CLOSE_SCRIPT = """
import sys
from test_onnxruntime import BACKEND, anonymous_bytes

with BACKEND.open(sys.argv[1]):
    pass
before, kept = anonymous_bytes(), []
with BACKEND.open(sys.argv[1]):
    print(anonymous_bytes() - before)
    kept.append(bytes(100_000))  # at the end of the heap, which keeps the free blocks before it
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_a_session_returns_its_memory(tmp_path: Path) -> None:
    count, size = 64, 512
    body = " ".join(f"x{index + 1} = MatMul (x{index}, w{index})" for index in range(count))
    weights = ", ".join(f"float[{size},{size}] w{index}" for index in range(count))
    model = onnx.parser.parse_model(model_text(f"(float[1,{size}] x0) => (float[1,{size}] x{count}) <{weights}> {{ {body} }}"))
    values = np.zeros((size, size), np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, f"w{index}") for index in range(count))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "g.onnx")
    grown, left = map(int, run_script(CLOSE_SCRIPT, tmp_path / "g.onnx").split())
    assert grown > 50e6
    assert left < 20e6


def test_a_matmul_with_dequantized_weights_computes_in_fp32(tmp_path: Path) -> None:
    """By default ONNX Runtime fuses the two nodes and quantizes the activations, which is an error of 1 %."""
    rng = np.random.default_rng(0)
    weights, x = rng.integers(-127, 127, (32, 16)).astype(np.int8), rng.standard_normal((4, 32)).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,32] x) => (float[N,16] y) '
        "{ d = DequantizeLinear (w, s)  y = MatMul (x, d) }"
    )
    for name, array in {"w": weights, "s": np.float32(0.02)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.save(proto, tmp_path / "g.onnx")
    with BACKEND.open(str(tmp_path / "g.onnx")) as session:
        y = session.run({"x": x})["y"]
    np.testing.assert_allclose(y, x @ (weights * np.float32(0.02)), rtol=1e-5, atol=1e-5)


QUANTIZED_PRODUCTS = {
    "MatMulInteger": "i = MatMulInteger (q, w, z, wz)  c = Cast <to = 1> (i)  {y} = Mul (c, product_scale)",
    "QLinearMatMul": "o = QLinearMatMul (q, s, z, w, ws, wz, os, z)  {y} = DequantizeLinear (o, os, z)",
    "QDQ": (
        "d = DequantizeLinear (q, s, z)  wd = DequantizeLinear (w, ws, wz)  m = MatMul (d, wd)  "
        "o = QuantizeLinear (m, os, z)  {y} = DequantizeLinear (o, os, z)"
    ),
    "QDQ without a zero point": (
        "d = DequantizeLinear (q, s, z)  wd = DequantizeLinear <axis = 1> (w, column_scales)  m = MatMul (d, wd)  "
        "o = QuantizeLinear (m, os, z)  {y} = DequantizeLinear (o, os, z)"
    ),
}


@pytest.mark.parametrize(
    ("form", "sharing"),
    [
        *itertools.product(QUANTIZED_PRODUCTS, ["nothing", "zero point", "weight"]),
        ("QDQ", "dequantized weight"),
    ],
)
def test_products_of_uint8_and_int8_do_not_saturate(
    form: str, sharing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default ONNX Runtime saturates sums of two products at 16 bits on CPUs without VNNI; those of this test are larger.

    With its option against that, it refuses graphs whose products share tensors. On other CPUs the graph is prepared here too.
    """
    monkeypatch.setattr(quantized_weights, "_cpu_saturates", lambda: True)
    rng = np.random.default_rng(0)
    weights, x = rng.integers(64, 128, (64, 16)).astype(np.int8), rng.uniform(2.5, 5, (4, 64)).astype(np.float32)
    scale, weight_scale, output_scale = np.float32(0.02), np.float32(0.01), np.float32(2)
    first = QUANTIZED_PRODUCTS[form].format(y="y")
    kept = {"nothing": set(), "zero point": {"wz"}, "weight": {"w", "wz"}, "dequantized weight": {"w", "wz", "wd"}}[sharing]
    second = re.sub(r"\b(i|c|o|d|m|w|wz|wd)\b", lambda name: name[1] if name[1] in kept else name[1] + "2", first)
    second = second.replace("y =", "y2 =")
    if "wd" in kept:
        second = second.replace("wd = DequantizeLinear (w, ws, wz)", "")
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,64] x) => (float[N,16] y, float[N,16] y2) '
        f"{{ q = QuantizeLinear (x, s, z)  {first}  {second} }}"
    )
    constants = {"s": scale, "z": np.uint8(0), "w": weights, "ws": weight_scale, "wz": np.int8(0), "os": output_scale}
    constants |= {
        "column_scales": np.full(16, weight_scale),
        "w2": weights[::-1].copy(),
        "wz2": np.int8(0),
        "product_scale": scale * weight_scale,
    }
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.save(proto, tmp_path / "g.onnx", save_as_external_data=True, size_threshold=100)
    tolerance = 1e-4 if form == "MatMulInteger" else output_scale * 0.501
    with BACKEND.open(str(tmp_path / "g.onnx")) as session:
        outputs = session.run({"x": x})
    for name, weight in {"y": weights, "y2": weights if "w" in kept else weights[::-1]}.items():
        expected = np.clip(np.rint(x / scale), 0, 255) @ weight * (0.02 * 0.01)
        assert expected.max() < 255 * output_scale
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-5, atol=tolerance)
