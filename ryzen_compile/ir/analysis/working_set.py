"""The memory that a graph needs at least to run: the tensors of its largest node, for given sizes of the named dims."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import element_types
from ryzen_compile.ir.analysis.sizes import ShapeInference


class WorkingSet:
    """Computes the size of the inputs and outputs of the largest node of a graph; weights and subgraphs do not count."""

    def __init__(self, model: ir.Model) -> None:
        """Prepare the computation for `model`, whose graph must not change."""
        self._model = model
        self._inference = ShapeInference()
        self._dtypes = element_types(model)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Return a lower bound in bytes; tensors of unknown shape count as empty."""
        sizes_of_values: dict[ir.Value, int] = {}

        def size_of(value: ir.Value) -> int:
            if value not in sizes_of_values:
                sizes_of_values[value] = 0 if value.is_initializer() else self._value_bytes(value, sizes)
            return sizes_of_values[value]

        return max(
            (sum(size_of(value) for value in {*node.inputs, *node.outputs} if value is not None) for node in self._model.graph),
            default=0,
        )

    def _value_bytes(self, value: ir.Value, sizes: Mapping[str, int]) -> int:
        dims = self._inference.dims(value)
        if dims is None:
            return 0
        numbers = [self._inference.evaluate(dim, sizes) for dim in dims]
        known = [number for number in numbers if number is not None]
        dtype = self._dtypes.get(value, value.dtype)
        bits = 32 if dtype is None or dtype == ir.DataType.STRING else dtype.bitwidth
        return math.prod(known) * bits // 8 if len(known) == len(numbers) else 0
