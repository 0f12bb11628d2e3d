"""Shapes told by trying: what is a number, the batch, the tokens of a step or the length of the caches, on every axis.

Exporters compute the targets of their reshapes in the graph, in as many ways as there are exporters. With numbers for the dims
of the inputs ONNX's own inference follows them all; two sets of numbers tell which dim an axis is.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from ryzen_compile.spec.interface import Interface, resolve_dim

_LARGE_WEIGHT_ELEMENTS = 1024
"""Elements from which on a weight is given to the inference by its shape alone."""
_TRIAL_SIZES = ((2, 3, 5, 7), (11, 13, 17, 19))
"""Two sets of sizes for the dynamic dims, in their order; no two dims, nor a sum of two, agree in both."""


InferredTensors = dict[str, tuple[int, tuple[int | None, ...]]]
"""Tensor -> its element type and its shape."""


def infer_symbolic_shapes(model: ir.Model, interface: Interface) -> None:
    """Give every tensor of the main graph the shape that its dims are told to have, and its element type, in place."""
    names = sorted({word for spec in interface.inputs for dim in spec.dims or () for word in _symbols(dim)})
    if len(names) > len(_TRIAL_SIZES[0]):
        return
    tries = [dict(zip(names, numbers, strict=False)) for numbers in _TRIAL_SIZES]
    found = [_infer_with_sizes(model, interface, sizes) for sizes in tries]
    terms = {tuple(sizes[name] for sizes in tries): name for name in names}
    for one in names:
        for two in names:
            terms.setdefault(tuple(sizes[one] + sizes[two] for sizes in tries), f"{one}+{two}")
    for dim in {dim for spec in interface.inputs for dim in spec.dims or () if isinstance(dim, str)}:
        sized = tuple(resolve_dim(dim, sizes) for sizes in tries)
        if None not in sized:
            terms[sized] = dim  # type: ignore[index]
    for node in model.graph:
        for value in node.outputs:
            if any(value.name not in one for one in found):
                continue
            kinds, shapes = zip(*(one[value.name or ""] for one in found), strict=True)
            if len({len(shape) for shape in shapes}) > 1:
                continue
            if value.type is None and kinds[0]:
                value.type = ir.TensorType(ir.DataType(kinds[0]))
            dims = [_match_dim(pair, terms) for pair in zip(*shapes, strict=True)]
            old = value.shape
            value.shape = ir.Shape(
                [dim if dim is not None else (old[axis] if old is not None else None) for axis, dim in enumerate(dims)]
            )


def _symbols(dim: int | str) -> list[str]:
    return [word.strip() for word in dim.split("+") if not word.strip().isdecimal()] if isinstance(dim, str) else []


def _match_dim(pair: tuple[int | None, ...], terms: Mapping[tuple[int, ...], str]) -> int | str | None:
    if None in pair:
        return None
    return pair[0] if len(set(pair)) == 1 else terms.get(pair)  # type: ignore[arg-type]


def _infer_with_sizes(model: ir.Model, interface: Interface, sizes: Mapping[str, int]) -> InferredTensors:
    """Return the type and shape of every tensor for these sizes of the dims, as far as they are known."""
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
