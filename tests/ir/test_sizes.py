"""Shape inference on demand: symbolic dims, elements of shape tensors, and broadcasting of numbers and symbols."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDims
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.analysis.symbols import SymbolTable
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_passes.fold.iteration import FoldIteration
from ryzen_passes.fold.stats import FoldStats


def parse(inputs: str, body: str, outputs: str = "float[?] last", opset: int = 23) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    model = ir.from_proto(proto)
    for output in model.graph.outputs:
        output.shape = None
    return model


def value(model: ir.Model, name: str) -> ir.Value:
    return {item.name: item for item in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))}[name]


def described(model: ir.Model, name: str) -> str:
    sizes = ShapeInference()
    return sizes.describe(sizes.dims(value(model, name)))


def folded_dims(model: ir.Model, name: str) -> tuple[SymbolicDims | None, SymbolTable]:
    last = value(model, name)
    iteration = FoldIteration(model, FoldStats())
    iteration.run()
    return iteration.lookup_info(last).dims, iteration.symbols


BROADCASTS = [
    ("float[S] a, float[5] b", "(5)"),
    ("float[5] a, float[S] b", "(5)"),
    ("float[S] a, float[1] b", "(S)"),
    ("float[S] a, float[S] b", "(S)"),
    ("float[S,5] a, float[B,1,T] b", "(B, S, 5)"),
    ("float[S] a, float[T] b", "(?)"),
]
"""Two operands, and the shape of their sum. In a valid run a symbol next to 5 is 1 or 5; of S and T, either may be 1."""


@pytest.mark.parametrize(("inputs", "shape"), BROADCASTS)
def test_a_number_broadcast_with_a_symbol_is_the_number_and_two_symbols_are_unknown(inputs: str, shape: str) -> None:
    model = parse(inputs, "last = Add (a, b)")
    assert described(model, "last") == shape
    dims, symbols = folded_dims(model, "last")
    assert dims is not None
    assert f"({', '.join(map(symbols.describe, dims))})" == shape


def test_the_dim_of_an_empty_tensor_is_the_result_of_a_broadcast_with_a_symbol() -> None:
    model = parse("float[S] a", "none = Constant <value = float[0] {}> ()  last = Add (a, none)")
    assert described(model, "last") == "(0)"
    assert folded_dims(model, "last")[0] == (0,)


def test_the_declared_sum_of_two_dims_equals_their_computed_sum() -> None:
    model = parse(
        "float[B,4,past,8] cache, float[B,4,seq,8] new, float[B,total] mask",
        "last = Concat <axis=2> (cache, new)",
    )
    mask = value(model, "mask")
    mask.shape = ir.Shape(["B", "past + seq"])
    sizes = ShapeInference()
    joined, declared = sizes.dims(value(model, "last")), sizes.dims(mask)
    assert joined is not None
    assert declared is not None
    assert joined[2] == declared[1]
    assert sizes.evaluate(joined[2], {"past": 5, "seq": 3}) == 8
    assert sizes.shape_of(joined) == ir.Shape(["B", 4, "past + seq", 8])
    assert sizes.symbols.may_depend_on(joined[2], {"past"})
    assert not sizes.symbols.may_depend_on(joined[0], {"past"})


def test_the_dims_of_a_reshape_follow_from_its_elements_and_equal_quotients_are_equal() -> None:
    model = parse(
        "float[B,S,W] x",
        """shape = Shape (x)  at0 = Constant <value_ints=[0]> ()  at1 = Constant <value_ints=[1]> ()
        b = Gather (shape, at0)  s = Gather (shape, at1)
        tail = Constant <value_ints=[-1,16]> ()  target = Concat <axis=0> (b, s, tail)
        first = Reshape (x, target)  last = Reshape (x, target)
        eight = Constant <value_ints=[8]> ()  eighth = Div (s, eight)  other = Expand (x, eighth)""",
    )
    assert described(model, "first") == "(B, S, (W) // (16), 16)"
    sizes = ShapeInference()
    assert sizes.dims(value(model, "first")) == sizes.dims(value(model, "last"))
    elements = sizes.int_values(value(model, "eighth"))
    assert elements is not None
    assert [sizes.evaluate(element, {"S": 19}) for element in elements] == [2]
    assert not sizes.symbols.may_depend_on(elements[0], {"B"})


def test_an_unknown_element_may_be_negative() -> None:
    model = parse(
        "int64[1] n, float[B,S] x",
        """minus = Constant <value_ints=[-1, -1]> ()  one = Constant <value_ints=[1]> ()
        shape = Concat <axis=0> (n, one)  test = Equal (shape, minus)  last = Reshape (x, shape)""",
    )
    sizes = ShapeInference()
    assert sizes.int_values(value(model, "test")) is None
    dims = sizes.dims(value(model, "last"))
    assert dims is not None
    assert sizes.symbols.describe(dims[0]) == "?"
    assert dims[1] == 1


def test_the_statistics_of_a_normalization_do_not_get_the_shape_of_its_input() -> None:
    model = parse("float[B,S,8] x, float[8] w", "last, mean = LayerNormalization (x, w)", "float[B,S,8] last, float[?] mean")
    assert ShapeInference().dims(value(model, "mean")) is None


def test_sizes_are_traced_through_any_number_of_nodes_and_a_cycle_does_not_hang() -> None:
    steps = "  ".join(f"x{index + 1} = Relu (x{index})" for index in range(300))
    model = parse("float[B,7] x0", f"{steps}  last = Shape (x300)", "int64[2] last")
    for node in model.graph:
        node.outputs[0].shape = None
    assert described(model, "x300") == "(B, 7)"
    first = next(iter(model.graph))
    first.replace_input_with(0, value(model, "x300"))
    assert described(model, "x300") == "an unknown shape"


def test_a_node_with_too_few_inputs_has_an_unknown_shape() -> None:
    for op in ("Add", "Where", "Gather", "Expand", "MatMul", "Range", "Reshape", "Tile", "Gemm"):
        x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
        node = ir.node(op, [x])
        sizes = ShapeInference()
        assert sizes.dims(node.outputs[0]) is None, op
        assert sizes.int_values(node.outputs[0]) is None, op


def test_shapes_of_a_model_are_inferred_once() -> None:
    model = parse("float[B,4] x", "last = Relu (x)")
    info = ModelInfo(model)
    assert info.shapes.dims(value(model, "last")) is info.shapes.dims(value(model, "last"))


def test_a_polynomial_is_divided_by_a_polynomial() -> None:
    past, seq = d.symbol(0), d.symbol(1)
    total = d.add(past, seq)
    assert total is not None
    product = d.multiply(d.multiply(total, 64) or 0, total)
    assert product is not None
    assert d.divide(product, d.multiply(total, 16) or 0) == d.multiply(total, 4)
    assert d.divide(product, d.add(total, 1) or 0) is None
    assert d.lower_bound(d.symbol(-1)) is None


QUANTIZED_PRODUCTS = {
    "y = com.microsoft.MatMulNBits <K = 48, N = 7, bits = 4, block_size = 32> (x, data, scales)": "(B, S, 7)",
    "y = com.microsoft.MatMulNBits <bits = 4, block_size = 32> (x, data, scales)": "an unknown shape",
    "y = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32, quantize_axis = 1> (data, i, scales)": "(B, S, 48)",
    "y = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 32, quantize_axis = 1> (data, i, scales)": "(B, S, 24)",
    "y = com.microsoft.GatherBlockQuantized <block_size = 32, quantize_axis = 1> (int4s, i, scales)": "(B, S, 24)",
    "y = com.microsoft.GatherBlockQuantized <gather_axis = 1, quantize_axis = 0> (int4s, i, scales)": "an unknown shape",
    "y = other.MatMulNBits <K = 48, N = 7, bits = 4, block_size = 32> (x, data, scales)": "an unknown shape",
}
"""A node with weights that are quantized in blocks, and the shape of its output."""


@pytest.mark.parametrize("body", QUANTIZED_PRODUCTS)
def test_shapes_of_ops_with_quantized_weights_follow_from_their_attributes_and_data(body: str) -> None:
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "other" : 1]>
        g (float[B,S,48] x, int64[B,S] i, uint8[7,24] data, int4[7,24] int4s, float[7,2] scales) => (float[?] y) {{
            {body}
        }}""")
    model = ir.from_proto(proto)
    model.graph.outputs[0].shape = None
    assert described(model, "y") == QUANTIZED_PRODUCTS[body]


def test_the_outputs_of_topk_have_its_number_of_elements() -> None:
    body = "k = Shape (n)  values, indices = TopK <axis = 0> (x, k)  last = Cast <to = 1> (indices)"
    assert described(parse("float[A, T] x, float[S] n", body), "last") == "(S, T)"
    assert described(parse("float[A, T] x, int64[1] n", "values, i = TopK (x, n)  last = Abs (values)"), "last") == "(A, ?)"
