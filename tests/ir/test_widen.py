"""Half-precision tensors becoming fp32."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.element_types import HALF_TYPES, element_types
from ryzen_compile.ir.edit.upcast import upcast_to_fp32


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def test_only_the_asked_types_are_widened() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float16[N] x, bfloat16[N] z) => (float16[N] y, bfloat16[N] w) { y = Neg (x)  w = Neg (z) }
    """)
    upcast_to_fp32(model, {ir.DataType.FLOAT16})
    assert {str(value.name): dtype.name for value, dtype in element_types(model).items()} == {
        "x": "FLOAT", "y": "FLOAT", "z": "BFLOAT16", "w": "BFLOAT16",
    }  # fmt: skip


def test_what_is_in_a_sequence_is_widened() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]> g (seq(float16[N]) x) => (seq(float16[N]) y) { y = Identity (x) }
    """)
    upcast_to_fp32(model, HALF_TYPES)
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_norm_that_asked_for_half_statistics_asks_for_fp32() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (bfloat16[N] x) => (bfloat16[N] y) { y = LayerNormalization <stash_type: int = 16> (x, x) }
    """)
    upcast_to_fp32(model, HALF_TYPES)
    assert model.graph[0].attributes.get_int("stash_type") == ir.DataType.FLOAT


@pytest.mark.parametrize(("given", "to", "reads"), [("float16", 2, True), ("uint16", 10, True), ("float", 6, False)])
def test_a_model_that_reads_the_bits_of_a_half_is_refused(given: str, to: int, reads: bool) -> None:
    model = parse(
        f'<ir_version: 13, opset_import: ["" : 26]> g ({given}[N] x) => (y) {{ [bits] y = BitCast <to: int = {to}> (x) }}'
    )
    if reads:
        with pytest.raises(ModelError, match="bits"):
            upcast_to_fp32(model, HALF_TYPES)
    else:
        assert upcast_to_fp32(model, HALF_TYPES) == []
