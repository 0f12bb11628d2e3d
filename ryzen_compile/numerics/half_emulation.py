"""Emulation of half precision in fp32: a graph computes in fp32 and rounds to the half type after every op.

On a CPU ONNX Runtime computes fp16 in fp32, fuses ops, and thereby hides overflow: 300 * 300 / 1000 is 90 there and infinity
on a GPU. It has no bf16 implementation of most ops. Its casts are exact: fp32 -> half -> fp32 rounds to nearest, ties to
even, and overflows to infinity. A half graph is therefore rewritten to an fp32 graph with a pair of casts after each op.

What is modeled: the result of every op, rounded once. For +, -, *, / and the square root this is bit for bit the half-precision
result, because fp32 has more than twice the significand bits of either half type. Every other op is computed in fp32 and
rounded at its output, as TensorRT does for matrix products, convolutions, normalization and softmax. Attention (ONNX
Attention or `TRT_Attention`) counts as one op: scores and softmax stay in fp32 inside, as in the fused kernels; these round
the probabilities to half before the product with V, this emulation does not. Every other local function also counts as one op.

What is not modeled: the order of a summation, and accumulation in half precision. The emulation also rounds where a fused
kernel does not: for a chain of pointwise ops that TensorRT keeps in registers, the engine is more accurate than the emulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ryzen_compile.ir.analysis.op_traits import DATA_MOVEMENT_OPS

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import NameAllocator

_EXACT_OPS = DATA_MOVEMENT_OPS | frozenset(
    """Where Max Min Clip Relu Neg Abs Sign Floor Ceil Round MaxPool GlobalMaxPool ReduceMax ReduceMin TopK Constant
    ConstantOfShape""".split()
)
"""Ops whose results are representable in half precision whenever their inputs are."""


def emulate_half_precision(model: ir.Model) -> ir.Model:
    """Return a copy of `model` that computes in fp32 and rounds each half-precision tensor where it is computed.

    Inputs and outputs keep their names; those in half precision become fp32, and such an input is rounded first. Weights are
    read and converted only when needed. `model` is not modified.
    """
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.constants import int_attribute_or_none
    from ryzen_compile.ir.analysis.element_types import HALF_TYPES, element_types
    from ryzen_compile.ir.edit.fp32_conversion import convert_to_fp32
    from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset
    from ryzen_compile.ir.traversal import nested_graphs

    copy = model.clone()
    types = element_types(copy)
    values_to_round = [
        (value, types[value], graph)
        for graph in nested_graphs(copy.graph)
        for value in _values_defined_in(graph, is_main=graph is copy.graph)
        if value.name and types.get(value) in HALF_TYPES and not _needs_no_rounding(value, types)
    ]
    for function in copy.functions.values():
        for graph in nested_graphs(function.graph):
            # Inside a function only the results of casts have a known type; all others depend on the call.
            casts = [(node, int_attribute_or_none(node, "to", 0)) for node in graph if node.op_type == "Cast"]
            values_to_round += [(node.outputs[0], ir.DataType(to), graph) for node, to in casts if to in HALF_TYPES]
    convert_to_fp32(copy, HALF_TYPES)
    names = NameAllocator(copy)
    ensure_standard_opset(copy)
    for value, dtype, graph in values_to_round:
        _insert_rounding(value, dtype, graph, names)
    return copy


def _values_defined_in(graph: ir.Graph, *, is_main: bool) -> Iterator[ir.Value]:
    # The inputs of a subgraph are rounded where they are computed.
    if is_main:
        yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _needs_no_rounding(value: ir.Value, types: Mapping[ir.Value, ir.DataType]) -> bool:
    node = value.producer()
    if node is None or node.op_type not in _EXACT_OPS or node.domain not in ("", "ai.onnx"):
        return False
    input_types = {types.get(source) for source in node.inputs if source is not None}
    return not any(dtype is None or (dtype.is_floating_point() and dtype != types[value]) for dtype in input_types)


def _insert_rounding(value: ir.Value, dtype: ir.DataType, graph: ir.Graph, names: NameAllocator) -> None:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import insert_after, make_cast

    name, uses = str(value.name), list(value.uses())
    to_half = make_cast(value, dtype, names.allocate(f"{name}.half"))
    to_fp32 = make_cast(to_half.outputs[0], ir.DataType.FLOAT, names.allocate(f"{name}.rounded"))
    insert_after(value, [to_half, to_fp32], graph)
    for node, index in uses:
        node.replace_input_with(index, to_fp32.outputs[0])
    if value.is_graph_output() and not value.is_graph_input():
        # The rounded tensor takes the output's name: callers refer to it.
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = to_fp32.outputs[0]
        value.name = names.allocate(f"{name}.exact")
        to_fp32.outputs[0].name = name
