"""Symbolic shape inference by substitution: identifies every axis as a number or as a named dim (batch, seq, past).

Exporters compute the targets of Reshape nodes in the graph, in many different ways. ONNX shape inference resolves all of them
once the input dims are numbers. Two runs with different numbers determine which named dim an axis has.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

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
    inferred_per_trial = [_infer_with_sizes(model, interface, sizes) for sizes in trials]
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


def _infer_with_sizes(model: ir.Model, interface: Interface, sizes: Mapping[str, int]) -> InferredTensors:
    """Return the element type and shape of every tensor for `sizes` of the named dims, as far as they can be inferred."""
    copy = model.clone()
    graph = copy.graph
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
