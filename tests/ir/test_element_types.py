"""Tests of element type inference."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.ir.analysis.element_types import element_types


def types_of(body: str, *, inputs: str = "float16[N] x", functions: str = "", imports: str = "") -> dict[str, ir.DataType]:
    text = f'<ir_version: 10, opset_import: ["" : 21{imports}]> g ({inputs}) => (y) {{ {body} }} {functions}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    return {str(value.name): dtype for value, dtype in element_types(model).items()}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Neg (x)", "FLOAT16"),
        ("y = Cast <to: int = 16> (x)", "BFLOAT16"),
        ("y = Shape (x)", "INT64"),
        ("y = IsNaN (x)", "BOOL"),
        ("c = Constant <value_float: float = 1.0> ()  y = Neg (c)", "FLOAT"),
        ("c = Constant <value: tensor = double {1.0}> ()  y = CastLike (x, c)", "DOUBLE"),
        ("s = Shape (x)  y = ConstantOfShape (s)", "FLOAT"),
        ("s = Shape (x)  y = ConstantOfShape <value: tensor = int32[1] {1}> (s)", "INT32"),
        ("y = RandomNormalLike (x)", "FLOAT16"),
        ("y = RandomNormal <shape: ints = [2]> ()", "FLOAT"),
        ("y, m, s = LayerNormalization (x, x)", "FLOAT16"),
        ("m, y, s = LayerNormalization (x, x)", "FLOAT"),
        ("q, s, z = DynamicQuantizeLinear (x)  y = DequantizeLinear (q, x, z)", "FLOAT16"),
        ("y = Sum (x, x, x)", "FLOAT16"),
        ("a, y = Split <num_outputs: int = 2> (x)", "FLOAT16"),
    ],
)
def test_type_is_inferred_from_the_op(body: str, expected: str) -> None:
    assert types_of(body)["y"].name == expected


def test_output_of_if_has_the_type_of_its_branches() -> None:
    body = "y = If (c) <then_branch = t () => (a) { a = Neg (x) }, else_branch = e () => (b) { b = Abs (x) }>"
    types = types_of(body, inputs="float16[N] x, bool c")
    assert (types["a"].name, types["y"].name) == ("FLOAT16", "FLOAT16")


def test_loop_body_inputs_and_loop_outputs_have_types() -> None:
    body = "y = Loop (n, c, x) <body = b (i, go, h) => (more, next) { more = Identity (go)  next = Neg (h) }>"
    types = types_of(body, inputs="float16[N] x, bool c, int64 n")
    assert {name: types[name].name for name in ("i", "go", "h", "y")} == {
        "i": "INT64", "go": "BOOL", "h": "FLOAT16", "y": "FLOAT16",
    }  # fmt: skip


def test_function_output_type_depends_on_the_types_of_the_call() -> None:
    types = types_of(
        "h = local.Double (x)  w = Cast <to: int = 1> (x)  y = local.Double (w)",
        functions='<domain: "local", opset_import: ["" : 21]> Double (a) => (c) { c = Add (a, a) }',
        imports=', "local" : 1',
    )
    assert (types["h"].name, types["y"].name) == ("FLOAT16", "FLOAT")


def test_unknown_op_has_no_type() -> None:
    assert "y" not in types_of("y = odd.Thing (x)", imports=', "odd" : 1')


def test_registered_op_has_its_declared_type() -> None:
    inputs = "float16[1,2,N,8] x"
    assert types_of("y = ryzen.TRT_Attention (x, x, x)", inputs=inputs, imports=', "ryzen" : 1')["y"].name == "FLOAT16"


def test_sequence_has_no_element_type() -> None:
    assert "s" not in types_of("s = SplitToSequence (x)  y = Neg (x)")
