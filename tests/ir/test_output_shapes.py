"""Declared shapes of outputs: corrected where shape inference contradicts them, kept everywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import ryzen_compile as rc
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save

Dims = list[int | str | None]


def save_classifier(path: Path, declared: Dims | None, *, op: str = "Softmax", domain: str = "") -> Path:
    """Write y = op(x @ w), x: (b, 8), w: (8, 5), whose output has the shape `declared`."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node(op, ["m"], ["y"], domain=domain)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, declared)],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def dims(model: ir.Model) -> list[int | str | None] | None:
    shape = model.graph.outputs[0].shape
    return None if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        pytest.param([], ["b", 5], id="no dimensions, as Paddle writes"),
        pytest.param([1, 5], ["b", 5], id="a number in place of the batch"),
        pytest.param(["b", 7], ["b", 5], id="another number"),
        pytest.param(["b", 5, 1], ["b", 5], id="another rank"),
        pytest.param([-1, 5], ["b", 5], id="a negative size"),
        pytest.param(["b", 5], ["b", 5], id="the right shape"),
        pytest.param(["rows", "classes"], ["rows", "classes"], id="names of the exporter"),
        pytest.param(None, ["b", 5], id="no shape"),
    ],
)
def test_a_declared_shape_that_contradicts_inference_is_corrected(
    declared: Dims | None, expected: Dims | None, tmp_path: Path
) -> None:
    assert dims(load(save_classifier(tmp_path / "m.onnx", declared))) == expected


def test_a_shape_that_cannot_be_inferred_is_kept(tmp_path: Path) -> None:
    assert dims(load(save_classifier(tmp_path / "m.onnx", [1, 7], op="Unknown", domain="other"))) == [1, 7]


def test_an_inferred_size_without_a_name_keeps_the_declared_one(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (int64[1,99] y) { y = NonZero (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert dims(load(tmp_path / "m.onnx")) == [1, 99]


def test_a_recorded_interface_is_trusted(tmp_path: Path) -> None:
    model = load(save_classifier(tmp_path / "m.onnx", ["b", 5]))
    model.graph.outputs[0].shape = ir.Shape([3, 5])  # without a record, it is corrected to b x 5
    interface = interface_of(model)
    write_interface(model, interface)
    save(model, tmp_path / "recorded.onnx")
    loaded = load(tmp_path / "recorded.onnx")
    assert dims(loaded) == [3, 5]
    assert interface_of(loaded) == interface


def test_a_build_compares_the_rows_of_an_output_without_declared_dimensions(tmp_path: Path) -> None:
    package = rc.build(save_classifier(tmp_path / "m.onnx", []), gpu="cpu", cache=False)
    (graph,) = package.manifest.graphs
    assert graph.interface.outputs[0].dims == ("b", 5)
    metrics = {metric.name for metric in graph.variants[0].accuracy[0].metrics}
    assert "batch_invariance_max_abs" in metrics
    onnx.checker.check_model(str(package.path / graph.variants[0].path), full_check=True)
