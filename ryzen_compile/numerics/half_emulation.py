"""The judge of half precision: a graph that computes in fp32 and rounds to the half after every op.

ONNX Runtime computes fp16 on a CPU in fp32, fuses what it can, and so hides overflow: 300 * 300 / 1000 is 90 there and
infinity on a GPU. And it lacks most ops in bf16. But it casts faithfully: fp32 -> half -> fp32 rounds to the nearest
(ties to even) and overflows to infinity. So the half graph is rewritten into an fp32 graph in which a pair of casts follows
each op.

What that models: the result of every op of the graph, rounded once. For +, -, *, / and the square root that is bit for bit
what the half op gives, as fp32 has more than twice the digits of either half; for all others it is the op computed in fp32
and rounded at its border, which is how TensorRT computes matrix products, convolutions, normalisations and softmax.
Attention, ONNX's or `TRT_Attention`, counts as one op: scores and softmax stay fp32 inside, as in the fused kernels; those
round the probabilities to the half before they meet V, and this does not. Other local functions are one op likewise.

What it does not model: the order of a sum, and accumulation in half precision. And it rounds where a fused kernel would
not: in a chain of pointwise ops that TensorRT keeps in registers the engine is more exact than this judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import NameAllocator

_EXACT_OPS = frozenset(
    """Identity Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather GatherElements GatherND Concat Split Expand Tile
    Pad DepthToSpace SpaceToDepth Where Max Min Clip Relu Neg Abs Sign Floor Ceil Round MaxPool GlobalMaxPool ReduceMax
    ReduceMin ReverseSequence Trilu TopK Constant ConstantOfShape""".split()
)
"""Ops that give halves whenever they are given halves."""


def emulate_half_precision(model: ir.Model) -> ir.Model:
    """Return a copy of `model` that computes in fp32 and rounds each half-precision tensor as soon as it is made.

    Its inputs and outputs have the names of those of `model`, and are fp32 where those are half: an input is rounded first.
    Weights are read from where they lie and not converted until then. `model` stays as it is.
    """
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import HALF_TYPES, element_types
    from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset
    from ryzen_compile.ir.edit.upcast import upcast_to_fp32

    copy = model.clone()
    types = element_types(copy)
    due = [
        (value, types[value], graph)
        for graph in (copy.graph, *copy.graph.subgraphs())
        for value in _values_defined_in(graph, is_main=graph is copy.graph)
        if value.name and types.get(value) in HALF_TYPES and not _needs_no_rounding(value, types)
    ]
    for function in copy.functions.values():
        for graph in (function.graph, *function.graph.subgraphs()):
            # Only casts tell their types in a function, which has those of its call.
            casts = ((node, node.attributes["to"]) for node in graph if node.op_type == "Cast")
            due += [(node.outputs[0], ir.DataType(to.value), graph) for node, to in casts if to.value in HALF_TYPES]
    upcast_to_fp32(copy, HALF_TYPES)
    names = NameAllocator(copy)
    ensure_standard_opset(copy)
    for value, dtype, graph in due:
        _insert_rounding(value, dtype, graph, names)
    return copy


def _values_defined_in(graph: ir.Graph, *, is_main: bool) -> Iterator[ir.Value]:
    # What a subgraph is given was rounded where it was made.
    if is_main:
        yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _needs_no_rounding(value: ir.Value, types: Mapping[ir.Value, ir.DataType]) -> bool:
    node = value.producer()
    if node is None or node.op_type not in _EXACT_OPS or node.domain not in ("", "ai.onnx"):
        return False
    given = {types.get(source) for source in node.inputs if source is not None}
    return not any(dtype is None or (dtype.is_floating_point() and dtype != types[value]) for dtype in given)


def _insert_rounding(value: ir.Value, dtype: ir.DataType, graph: ir.Graph, names: NameAllocator) -> None:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import insert_after, make_cast

    name, readers = str(value.name), list(value.uses())
    narrow = make_cast(value, dtype, names.allocate(f"{name}.half"))
    wide = make_cast(narrow.outputs[0], ir.DataType.FLOAT, names.allocate(f"{name}.rounded"))
    insert_after(value, [narrow, wide], graph)
    for node, index in readers:
        node.replace_input_with(index, wide.outputs[0])
    if value.is_graph_output() and not value.is_graph_input():
        # The rounded tensor takes the name, as that is what a caller asks for.
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = wide.outputs[0]
        value.name = names.allocate(f"{name}.exact")
        wide.outputs[0].name = name
