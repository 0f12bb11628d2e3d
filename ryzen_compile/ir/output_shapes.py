"""Output shapes: a declared shape that contradicts the shape inference of ONNX is replaced by the inferred one.

Some exporters, such as Paddle's, declare outputs without dimensions or with sizes of another graph; runtimes ignore that.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from ryzen_compile.ir.validity import infer_output_shapes


def correct_output_shapes(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Correct the declared shapes of the outputs of `model`, which was read from `proto`, in place.

    A shape is replaced if none is declared or the inferred one has another rank, and a size if the inferred one is another
    number, or the dim of an input. Names and sizes that cannot be inferred are kept, and so are shapes that inference does not
    reach: those behind ops of other domains.
    """
    inferred = infer_output_shapes(proto)
    input_dims = {
        dim.value for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim) and dim.value
    }
    for value in model.graph.outputs:
        shape = inferred.get(value.name or "")
        if shape is not None and not value.is_graph_input():
            value.shape = _merge(value.shape, shape, input_dims)


def _merge(declared: ir.Shape | None, inferred: list[int | str | None], input_dims: Collection[str]) -> ir.Shape:
    """Return `declared` with what contradicts `inferred` replaced; of the inferred names, only those of input dims count."""
    known = [dim if isinstance(dim, int) or dim in input_dims else None for dim in inferred]
    if declared is None or len(declared) != len(known):
        return ir.Shape(known)
    dims = [
        new if new is not None and isinstance(old, int) and old != new else old
        for old, new in zip(declared, known, strict=True)
    ]
    return ir.Shape(dims)
