"""Tests of model snapshots: every change of a model's structure is detected, and an equal model is not a change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.pipeline.model_snapshot import ModelSnapshot

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N] x, bool c) => (float[N] y) <float[2] w = {1.0, 2.0}> {
    [neg] a = Neg (x)
    [scale] b = Mul (a, w)
    [axis] k = Constant <value = float {3.0}> ()
    [branch] d = If (c) <
        then_branch = t () => (float[N] s) { [inner] s = Relu (b) },
        else_branch = e () => (float[N] o) { o = Identity (a) }
    >
    [leaky] y = LeakyRelu <alpha: float = 0.5> (d)
}
"""


def parse() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


def set_attribute(model: ir.Model) -> None:
    node(model, "leaky").attributes["alpha"] = ir.AttrFloat32("alpha", 0.25)


def set_tensor_attribute(model: ir.Model) -> None:
    node(model, "axis").attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float32(4)))


def replace_weight(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.array([1, 3], np.float32))


def rewire(model: ir.Model) -> None:
    node(model, "scale").replace_input_with(0, model.graph.inputs[0])


def change_inner_op(model: ir.Model) -> None:
    node(model, "inner").op_type = "Sigmoid"


def add_node(model: ir.Model) -> None:
    model.graph.append(ir.node("Exp", [model.graph.inputs[0]], name="added"))


def set_metadata(model: ir.Model) -> None:
    model.metadata_props["key"] = "value"


def set_opset(model: ir.Model) -> None:
    model.opset_imports["custom"] = 1


def change_output(model: ir.Model) -> None:
    model.graph.outputs[0] = node(model, "scale").outputs[0]


def change_input_shape(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([4])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (set_attribute, "node `leaky` [LeakyRelu] has other inputs, outputs or attributes"),
        (set_tensor_attribute, "node `axis` [Constant] has other inputs, outputs or attributes"),
        (replace_weight, "its weights differ"),
        (rewire, "node `scale` [Mul] has other inputs, outputs or attributes"),
        (change_inner_op, "node `branch` [If] has other inputs, outputs or attributes"),
        (add_node, "it has 6 nodes instead of 5"),
        (set_metadata, "its metadata differ"),
        (set_opset, "its opsets differ"),
        (change_output, "its outputs differ"),
        (change_input_shape, "its inputs differ"),
    ],
)
def test_a_change_of_the_structure_is_described(change: Callable[[ir.Model], None], difference: str) -> None:
    model = parse()
    snapshot = ModelSnapshot(model)
    assert snapshot.difference(model) is None
    change(model)
    assert snapshot.difference(model) == difference


def test_an_equal_model_is_not_a_change() -> None:
    model = parse()
    snapshot = ModelSnapshot(model)
    assert snapshot.difference(model.clone()) is None
    assert snapshot.difference(parse()) is None, "tensors of equal content"


def test_names_of_inner_values_and_their_shapes_are_not_a_change() -> None:
    model = parse()
    snapshot = ModelSnapshot(model)
    node(model, "neg").outputs[0].name = "renamed"
    node(model, "neg").outputs[0].shape = ir.Shape(["N"])
    assert snapshot.difference(model) is None
