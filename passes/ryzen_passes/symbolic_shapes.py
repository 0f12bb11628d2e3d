"""Symbolic shape inference by substitution: identifies every axis as a number or as a named dim (batch, seq, past).

Exporters compute the targets of Reshape nodes in the graph, in many different ways. ONNX shape inference resolves all of them
once the input dims are numbers. Two runs with different numbers determine which named dim an axis has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.block_quantized import BLOCK_QUANTIZED_OPS, MATMUL_NBITS, dense_weight_dims, op_key
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.spec.dims import dim_names, resolve_dim
from ryzen_compile.spec.interface import Interface

_LARGE_WEIGHT_ELEMENTS = 1024
"""Weights with more elements are passed to shape inference by shape only, without their data."""
_TRIAL_SIZES = ((2, 3, 5, 7), (11, 13, 17, 19))
"""Two sets of sizes for the dynamic dims, in order; no two dims, and no sums of two dims, are equal in both sets."""


InferredTensors = dict[str, tuple[int, tuple[int | None, ...]]]
"""Tensor name -> ONNX element type and shape; None for an unknown dim."""


def infer_symbolic_shapes(model: ir.Model, interface: Interface) -> None:
    """Set the inferred shape and, if missing, the element type of every node output of the main graph, in place.

    Does nothing if the inputs have more than four dynamic dims.
    """
    names = sorted({name for spec in interface.inputs for dim in spec.dims or () for name in dim_names(dim)})
    if len(names) > len(_TRIAL_SIZES[0]):
        return
    trials = [dict(zip(names, numbers, strict=False)) for numbers in _TRIAL_SIZES]
    weight_dims = _dense_weight_dims(model)
    inferred_per_trial = [_infer_with_sizes(model, interface, sizes, weight_dims) for sizes in trials]
    terms = {tuple(sizes[name] for sizes in trials): name for name in names}
    for name in names:
        for other in names:
            terms.setdefault(tuple(sizes[name] + sizes[other] for sizes in trials), f"{name}+{other}")
    for dim in {dim for spec in interface.inputs for dim in spec.dims or () if isinstance(dim, str)}:
        trial_sizes = tuple(resolve_dim(dim, sizes) for sizes in trials)
        if None not in trial_sizes:
            terms[trial_sizes] = dim  # type: ignore[index]
    for node in model.graph:
        for value in node.outputs:
            if any(value.name not in inferred for inferred in inferred_per_trial):
                continue
            elem_types, shapes = zip(*(inferred[value.name or ""] for inferred in inferred_per_trial), strict=True)
            if len({len(shape) for shape in shapes}) > 1:
                continue
            if value.type is None and elem_types[0]:
                value.type = ir.TensorType(ir.DataType(elem_types[0]))
            dims = [_match_dim(axis_sizes, terms) for axis_sizes in zip(*shapes, strict=True)]
            declared = value.shape
            value.shape = ir.Shape(
                [dim if dim is not None else declared[axis] if declared is not None else None for axis, dim in enumerate(dims)]
            )


def _match_dim(axis_sizes: tuple[int | None, ...], terms: Mapping[tuple[int, ...], str]) -> int | str | None:
    if None in axis_sizes:
        return None
    return axis_sizes[0] if len(set(axis_sizes)) == 1 else terms.get(axis_sizes)  # type: ignore[arg-type]


def _dense_weight_dims(model: ir.Model) -> list[tuple[int, int] | None]:
    """Return, for each node of the main graph, the shape of its dequantized weights; None for nodes without such weights."""
    shapes = ShapeInference()
    return [
        dense_weight_dims(node, shapes.info(node.inputs[0]) if node.inputs[0] is not None else None)
        if op_key(node) in BLOCK_QUANTIZED_OPS
        else None
        for node in model.graph
    ]


def _replace_block_quantized_ops(graph: ir.Graph, weight_dims: Sequence[tuple[int, int] | None]) -> None:
    """Replace the ops with quantized weights by MatMul and Gather over inputs of `graph`, whose shapes ONNX infers."""
    for node, dims in zip(list(graph), weight_dims, strict=True):
        if dims is None:
            continue
        scales, output = node.inputs[2], node.outputs[0]
        dtype = (scales.dtype if scales is not None else None) or ir.DataType.FLOAT
        dense = ir.Value(name=f"{output.name}_dense_weights", shape=ir.Shape(dims), type=ir.TensorType(dtype))
        graph.inputs.append(dense)
        is_product = op_key(node) == MATMUL_NBITS
        inputs = [node.inputs[0], dense] if is_product else [dense, node.inputs[1]]
        replacement = ir.node("MatMul" if is_product else "Gather", inputs, name=node.name)
        replacement.outputs[0].name = output.name
        graph.insert_before(node, replacement)
        output.replace_all_uses_with(replacement.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _infer_with_sizes(
    model: ir.Model, interface: Interface, sizes: Mapping[str, int], weight_dims: Sequence[tuple[int, int] | None]
) -> InferredTensors:
    """Return the element type and shape of every tensor for `sizes` of the named dims, as far as they can be inferred."""
    copy = model.clone()
    graph = copy.graph
    _replace_block_quantized_ops(graph, weight_dims)
    specs = {spec.name: spec for spec in interface.inputs}
    for value in graph.inputs:
        spec = specs.get(value.name or "")
        if spec is not None and spec.dims is not None:
            value.shape = ir.Shape([resolve_dim(dim, sizes) for dim in spec.dims])
    for output in (*graph.outputs, *(value for node in graph for value in node.outputs)):
        output.shape = None
    for value in [*graph.initializers.values()]:
        tensor = value.const_value
        if tensor is not None and tensor.size > _LARGE_WEIGHT_ELEMENTS:
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            del graph.initializers[value.name or ""]
            value.const_value = None
            graph.inputs.append(value)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=True)
    return {
        info.name: (
            info.type.tensor_type.elem_type,
            tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim),
        )
        for info in (*inferred.graph.value_info, *inferred.graph.output)
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape")
    }
