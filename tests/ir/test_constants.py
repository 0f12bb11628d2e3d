"""Tests of the functions that read constants and attributes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.constants import (
    constant_ints,
    constant_node_tensor,
    constant_scalar,
    constant_tensor,
    float_attribute,
    int_attribute,
    int_attribute_or_none,
    ints_attribute,
)


def constant(**attributes: ir.Attr | ir.TensorProtocol | int | float | str | list[int] | list[float]) -> ir.Value:
    return ir.node("Constant", [], attributes).outputs[0]


def initializer(array: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    return ir.Value(name="w", const_value=ir.tensor(array))


def test_initializers_and_constant_nodes_are_constant() -> None:
    array = np.array([1, 2], np.int64)
    for value in (initializer(array), constant(value=ir.tensor(array)), constant(value_ints=[1, 2])):
        tensor = constant_tensor(value)
        assert tensor is not None
        assert tensor.dtype == ir.DataType.INT64
        assert constant_ints(value) == (1, 2)


def test_other_values_are_not_constant() -> None:
    assert constant_tensor(None) is None
    assert constant_tensor(ir.node("Neg", [None]).outputs[0]) is None
    assert constant_tensor(ir.node("Constant", [], {"value_int": 1}, domain="com.example").outputs[0]) is None
    reference = ir.Node("", "Constant", [], [ir.RefAttr("value", "outer", ir.AttributeType.TENSOR)])
    assert constant_node_tensor(reference) is None


def test_the_default_of_an_input_is_constant_only_on_request() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
            <ir_version: 10, opset_import: ["" : 21]>
            g (float[1] x, float[1] w = {2.0}) => (float[1] y) { y = Add (x, w) }
        """)
    )
    weight = model.graph.initializers["w"]
    assert weight.is_graph_input()
    assert constant_tensor(weight) is None
    assert constant_scalar(weight) is None
    assert constant_scalar(weight, overridable=True) == 2.0


def test_integers_are_read_up_to_rank_1_and_a_number_of_elements() -> None:
    assert constant_ints(constant(value_int=3)) == (3,)
    assert constant_ints(initializer(np.array([True, False]))) == (True, False)
    assert constant_ints(initializer(np.ones((1, 1), np.int64))) is None
    assert constant_ints(initializer(np.ones(1, np.float32))) is None
    assert constant_ints(initializer(np.ones(17, np.int64))) is None
    assert constant_ints(initializer(np.ones(17, np.int64)), max_elements=17) == (1,) * 17


def test_scalars_have_one_element_and_are_real_numbers() -> None:
    assert constant_scalar(constant(value_float=0.5)) == 0.5
    assert constant_scalar(initializer(np.full((1, 1), 4, np.int32))) == 4.0
    assert constant_scalar(initializer(np.zeros(2, np.float32))) is None
    assert constant_scalar(constant(value_string="a")) is None
    assert constant_scalar(initializer(np.array(1j, np.complex64))) is None


def test_attributes_have_defaults_and_references_are_not_read() -> None:
    node = ir.node("X", [], {"axis": 2, "scale": 0.5, "perm": [1, 0]})
    assert int_attribute(node, "axis", 0) == 2
    assert int_attribute(node, "to", 7) == 7
    assert float_attribute(node, "scale", 1.0) == 0.5
    assert float_attribute(node, "alpha", 1.0) == 1.0
    assert ints_attribute(node, "perm") == (1, 0)
    assert ints_attribute(node, "axes") is None
    reference = ir.Node("", "X", [], [ir.RefAttr("axis", "outer", ir.AttributeType.INT)])
    assert int_attribute_or_none(reference, "axis", 0) is None
    assert int_attribute_or_none(reference, "to", 7) == 7


@pytest.mark.parametrize(
    ("read", "required"),
    [(int_attribute, "INT"), (float_attribute, "FLOAT"), (ints_attribute, "INTS")],
    ids=["int", "float", "ints"],
)
def test_attributes_of_another_type_are_refused(read: Callable[..., object], required: str) -> None:
    node = ir.node("SkipSimplifiedLayerNormalization", [], {"epsilon": "1e-5"}, domain="com.microsoft", name="norm")
    arguments = () if read is ints_attribute else (1,)
    with pytest.raises(
        ModelError, match=f"attribute `epsilon` of SkipSimplifiedLayerNormalization `norm` has .* STRING.*{required} "
    ):
        read(node, "epsilon", *arguments)
