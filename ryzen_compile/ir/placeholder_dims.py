"""Placeholder names of dimensions: names that exporters write for an unknown size, and that are not symbols.

In ONNX, dimensions of the same name have the same size. Some exporters give all unknown dimensions one name, so that a shape
such as `?x3x?x?` would require equal batch, height and width. Each such dimension is treated as a dimension without a name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_PLACEHOLDER_PATTERN = re.compile(r"\s*(\?|-1|None|unk__\d+)?\s*", re.IGNORECASE)
"""`?` of Paddle, `-1` and `None` of converters that print a Python size, `unk__N` of tf2onnx and ONNX Runtime, or no name."""


def is_placeholder_dim_name(name: str | None) -> bool:
    """Tell whether `name` is absent or a placeholder for an unknown size."""
    return name is None or _PLACEHOLDER_PATTERN.fullmatch(name) is not None


def remove_placeholder_dim_names(model: ir.Model) -> None:
    """Remove the placeholder names of dimensions from all values of `model`, in place."""
    from ryzen_compile.ir.traversal import all_graphs

    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs):
            _remove_from_value(value)
        for node in graph:
            for value in node.outputs:
                _remove_from_value(value)


def _remove_from_value(value: ir.Value) -> None:
    shape = value.shape
    if shape is None:
        return
    axes = [
        axis
        for axis, dim in enumerate(shape)
        if not isinstance(dim, int) and dim.value is not None and is_placeholder_dim_name(dim.value)
    ]
    if axes:
        shape = shape.copy()
        for axis in axes:
            shape[axis] = None
        value.shape = shape
