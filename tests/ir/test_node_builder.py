"""Nodes that `NodeBuilder` inserts: their names."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder


@pytest.mark.parametrize(("name", "expected"), [("scale", "scale_abs"), ("", "mul_abs")])
def test_an_inserted_node_is_named_after_its_successor_or_the_op_type_of_it(name: str, expected: str) -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Mul(x, x) }')
    (node,) = model.graph
    node.name = name
    NodeBuilder(model.graph, ModelInfo(model)).op(node, "Abs", [model.graph.inputs[0]])
    assert [inserted.name for inserted in model.graph] == [expected, name]
