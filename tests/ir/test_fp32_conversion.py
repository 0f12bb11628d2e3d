"""Tests of the conversion of half-precision tensors to fp32."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.element_types import HALF_TYPES, element_types
from ryzen_compile.ir.edit.fp32_conversion import convert_to_fp32


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def test_only_the_given_types_are_converted() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float16[N] x, bfloat16[N] z) => (float16[N] y, bfloat16[N] w) { y = Neg (x)  w = Neg (z) }
    """)
    convert_to_fp32(model, {ir.DataType.FLOAT16})
    assert {str(value.name): dtype.name for value, dtype in element_types(model).items()} == {
        "x": "FLOAT", "y": "FLOAT", "z": "BFLOAT16", "w": "BFLOAT16",
    }  # fmt: skip


def test_element_type_of_a_sequence_is_converted() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]> g (seq(float16[N]) x) => (seq(float16[N]) y) { y = Identity (x) }
    """)
    convert_to_fp32(model, HALF_TYPES)
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_half_precision_stash_type_becomes_fp32() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (bfloat16[N] x) => (bfloat16[N] y) { y = LayerNormalization <stash_type: int = 16> (x, x) }
    """)
    convert_to_fp32(model, HALF_TYPES)
    assert model.graph[0].attributes.get_int("stash_type") == ir.DataType.FLOAT


@pytest.mark.parametrize(("input_type", "to", "is_refused"), [("float16", 2, True), ("uint16", 10, True), ("float", 6, False)])
def test_bitcast_of_half_precision_is_refused(input_type: str, to: int, is_refused: bool) -> None:
    model = parse(
        f'<ir_version: 13, opset_import: ["" : 26]> g ({input_type}[N] x) => (y) {{ [bits] y = BitCast <to: int = {to}> (x) }}'
    )
    if is_refused:
        with pytest.raises(ModelError, match="BitCast.* uses the bits of a number"):
            convert_to_fp32(model, HALF_TYPES)
    else:
        assert convert_to_fp32(model, HALF_TYPES) == []
