"""Tests of tensors that are cast to another element type while they are read."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from ryzen_compile.ir.lazy_cast import LazyCastTensor, max_magnitude
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def test_values_are_rounded_to_the_nearest_even() -> None:
    source = np.random.default_rng(0).standard_normal((37, 61)).astype(np.float32)
    np.testing.assert_array_equal(LazyCastTensor(ir.tensor(source), FLOAT16).numpy(), source.astype(np.float16))
    np.testing.assert_array_equal(LazyCastTensor(ir.tensor(source), BFLOAT16).numpy(), source.astype(ml_dtypes.bfloat16))


def test_all_read_methods_return_the_bytes_of_the_values() -> None:
    source = np.random.default_rng(0).standard_normal(3_000_001).astype(np.float32)
    tensor = LazyCastTensor(ir.tensor(source), FLOAT16)
    expected = source.astype(np.float16).tobytes()
    written = io.BytesIO()
    tensor.tofile(written)
    assert written.getvalue() == b"".join(map(bytes, tensor.chunks())) == tensor.tobytes() == expected


def test_bound_clips_finite_values_only() -> None:
    source = np.array([-1e9, -5, 0, 7, 1e9, np.inf, -np.inf, np.nan], np.float32)
    values = LazyCastTensor(ir.tensor(source), FLOAT, bound=10.0).numpy()
    np.testing.assert_array_equal(values, [-10, -5, 0, 7, 10, np.inf, -np.inf, np.nan])


def test_lazy_casts_compose() -> None:
    tensor = LazyCastTensor(LazyCastTensor(ir.tensor(np.array([-1e9, 0.1], np.float32)), FLOAT, bound=100.0), FLOAT16)
    np.testing.assert_array_equal(tensor.numpy(), np.array([-100, 0.1], np.float16))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, -3, 2], 3),
        ([1, np.inf, -np.inf], 1),
        ([np.nan, -2], 2),
        ([np.nan, np.inf], 0),
        ([], 0),
        ([0], 0),
    ],
)
def test_max_magnitude_ignores_non_finite_values(values: list[float], expected: float) -> None:
    assert max_magnitude(ir.tensor(np.array(values, np.float32))) == expected


def test_max_magnitude_covers_all_chunks() -> None:
    values = np.zeros(5_000_000, np.float32)
    values[-1] = -7
    assert max_magnitude(ir.tensor(values)) == 7


def test_weights_in_files_are_converted_on_saving(tmp_path: Path) -> None:
    source = np.random.default_rng(0).standard_normal((600, 1000)).astype(np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(source, name="w"), type=ir.TensorType(FLOAT), shape=ir.Shape([600, 1000]))
    y = ir.Value(name="y", type=ir.TensorType(FLOAT))
    graph = ir.Graph([], [y], nodes=[ir.node("Identity", [weight], outputs=[y])], initializers=[weight], opset_imports={"": 21})
    save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", weights="external")
    model = load(tmp_path / "m.onnx")
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value, value.type = LazyCastTensor(value.const_value, FLOAT16), ir.TensorType(FLOAT16)
    model.graph.outputs[0].type = ir.TensorType(FLOAT16)
    save(model, tmp_path / "half.onnx", weights="external")
    converted = load(tmp_path / "half.onnx").graph.initializers["w"].const_value
    assert converted is not None
    np.testing.assert_array_equal(converted.numpy(), source.astype(np.float16))


CONVERT_LARGE_MODEL = """
import re, sys
from ryzen_compile.spec.passes import PassContext
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save_to_store
from ryzen_passes.precision import ConvertPrecision
model = load(sys.argv[1])
ConvertPrecision(to=sys.argv[2]).rewrite(model, PassContext(backend="tensorrt-rtx"))
save_to_store(model, sys.argv[3] + "/half.onnx", sys.argv[3] + "/weights", threshold_bytes=1024)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_model_of_1_2_gb_is_converted_in_less_than_300_mb(tmp_path: Path, to: str) -> None:
    rows, width = 300_000, 1000  # one weight of 1.2 GB, larger than the memory limit
    with open(tmp_path / "w.bin", "wb") as file:
        for _ in range(100):
            file.write(np.full(rows * width // 100, 0.5, np.float32).tobytes())
    weight = ir.ExternalTensor("w.bin", 0, rows * width * 4, FLOAT, shape=ir.Shape([rows, width]), name="w", base_dir=tmp_path)
    value = ir.Value(name="w", const_value=weight, type=ir.TensorType(FLOAT), shape=ir.Shape([rows, width]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N"]))
    y = ir.Value(name="y", type=ir.TensorType(FLOAT))
    graph = ir.Graph(
        [ids], [y], nodes=[ir.node("Gather", [value, ids], outputs=[y])], initializers=[value], opset_imports={"": 21}
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
    completed = subprocess.run(
        [sys.executable, "-c", CONVERT_LARGE_MODEL, str(tmp_path / "m.onnx"), to, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(completed.stdout) < 300
    (stored,) = (tmp_path / "weights").iterdir()
    assert stored.stat().st_size == rows * width * 2
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == stored.name
