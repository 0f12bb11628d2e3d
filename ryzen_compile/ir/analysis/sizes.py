"""Shape inference on demand: the dims of tensors and the elements of shape tensors, inferred from the nodes that produce them.

Dims are `SymbolicDim`s; the rules of `shape_rules` and `data_propagation` infer them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_ints, constant_tensor, int_attribute_or_none
from ryzen_compile.ir.analysis.data_propagation import propagate
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims
from ryzen_compile.ir.analysis.shape_rules import InferredOutput, shape_rule
from ryzen_compile.ir.analysis.symbols import PartialDims, SymbolTable
from ryzen_compile.ir.analysis.value_info import SHAPE_DTYPES, ElementValues, ValueInfo, constant_info


class ShapeInference:
    """Infers the sizes of one model: from the nodes that produce a tensor, and from its declared shape.

    Tensors are assumed not to be empty, and the dim `past+seq` to be a sum: see `SymbolTable`. Results are cached per value, so
    the producer of a value must not change.
    """

    def __init__(self) -> None:
        self.symbols = SymbolTable(assume_nonempty=True, names_are_sums=True)
        self._infos: dict[ir.Value, ValueInfo] = {}
        self._axis_symbols: dict[tuple[ir.Value, int], SymbolicDim] = {}
        """(tensor, axis) -> the symbol of an unknown dim, so that each dim has one symbol."""
        self._element_symbols: dict[ir.Value, SymbolicDim] = {}
        """Tensor of one element -> the symbol of its unknown element."""

    def rank(self, value: ir.Value) -> int | None:
        """Return the rank of `value`, or None if it is unknown."""
        if value.shape is not None:
            return len(value.shape)
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def dims(self, value: ir.Value) -> SymbolicDims | None:
        """Return the size of every axis of `value`, or None if the rank is unknown."""
        return self.info(value).dims

    def int_values(self, value: ir.Value) -> ElementValues | None:
        """Return the elements of an integer or bool tensor of rank 0 or 1, or None if they are unknown."""
        return self.info(value).elements

    def evaluate(self, dim: SymbolicDim, sizes: Mapping[str, int]) -> int | None:
        """Return the number that `dim` is for these `sizes` of the named dims, or None if it is unknown."""
        return self.symbols.evaluate(dim, sizes)

    def shape_of(self, dims: SymbolicDims) -> ir.Shape | None:
        """Return `dims` as the shape of a value; None if a dim is neither a number nor the dim of a declared name."""
        named = [dim if isinstance(dim, int) else self.symbols.name_of(dim) for dim in dims]
        return None if None in named else ir.Shape(named)

    def describe(self, dims: SymbolicDims | None) -> str:
        """Return `dims` as text for messages: `(batch, 4, past+seq, 16)`."""
        return "an unknown shape" if dims is None else f"({', '.join(map(self.symbols.describe, dims))})"

    def info(self, value: ir.Value) -> ValueInfo:
        """Return all that is inferred about `value`."""
        infos = self._infos
        if value in infos:
            return infos[value]
        pending, sources = [value], dict[ir.Value, Sequence[ir.Value | None]]()
        while pending:
            current = pending[-1]
            if current in infos:
                pending.pop()
            elif current in sources:
                pending.pop()
                infos[current] = self._infer(current, sources[current])
            else:
                inputs = sources[current] = self._sources(current)
                pending += [source for source in inputs if source is not None and source not in infos and source not in sources]
        return infos[value]

    def _sources(self, value: ir.Value) -> Sequence[ir.Value | None]:
        """Return the inputs of the node that `value` is inferred from; empty if it is not inferred from a node."""
        node = value.producer()
        if node is None or shape_rule(node) is None or _is_declared_static(value):
            return ()
        return node.inputs

    def _infer(self, value: ir.Value, sources: Sequence[ir.Value | None]) -> ValueInfo:
        tensor = constant_tensor(value)
        if tensor is not None:
            return constant_info(tensor)
        declared = None if value.shape is None else tuple(value.shape)
        node = value.producer()
        inferred, operands = InferredOutput(), list[ValueInfo | None]()
        if sources and node is not None:
            operands = [None if source is None else self._operand_info(node, source) for source in sources]
            rule = shape_rule(node)
            outputs = (rule(node, operands, self.symbols) if rule is not None else None) or ()
            index = node.outputs.index(value)
            inferred = outputs[index] if index < len(outputs) else inferred
        info = ValueInfo(inferred.dtype or value.dtype, self._merge(value, declared, inferred.dims), inferred.elements)
        if operands and node is not None:
            info.elements = propagate(node, operands, info, self.symbols) or self._gathered_dims(node, info)
        return info

    def _operand_info(self, node: ir.Node, source: ir.Value) -> ValueInfo:
        """Return the info of an operand; the unknown element of a part of a Concat is a symbol."""
        info = self._infos.get(source)
        if info is None:  # an operand on a cycle
            return ValueInfo(source.dtype)
        if info.elements is None and node.op_type == "Concat" and info.dims == (1,) and info.dtype in SHAPE_DTYPES:
            element = self._element_symbols.setdefault(source, self.symbols.fresh_integer())
            return dataclasses.replace(info, elements=(element,))
        return info

    def _axis_symbol(self, value: ir.Value, axis: int) -> SymbolicDim:
        return self._axis_symbols.setdefault((value, axis), self.symbols.fresh())

    def _merge(
        self, value: ir.Value, declared: tuple[int | ir.SymbolicDim, ...] | None, inferred: PartialDims | None
    ) -> SymbolicDims | None:
        """Return the declared numbers, else the inferred dims, else the declared names, else a symbol for each axis."""
        if inferred is None or (declared is not None and len(declared) != len(inferred)):
            inferred = None if declared is None else (None,) * len(declared)
        if inferred is None:
            return None
        dims: list[SymbolicDim] = []
        for axis, dim in enumerate(inferred):
            declared_dim = None if declared is None else declared[axis]
            if isinstance(declared_dim, int) and declared_dim >= 0:
                dims.append(declared_dim)
            elif dim is not None:
                dims.append(dim)
            elif isinstance(declared_dim, ir.SymbolicDim) and declared_dim.value is not None:
                dims.append(self.symbols.named_dim(declared_dim.value))
            else:
                dims.append(self._axis_symbol(value, axis))
        return tuple(dims)

    def _gathered_dims(self, node: ir.Node, output: ValueInfo) -> ElementValues | None:
        """Return the symbols of Gather(Shape(x), constant) for an x of unknown rank, or None for other nodes."""
        if node.op_type != "Gather" or len(node.inputs) < 2 or node.inputs[0] is None:
            return None
        shape_node, indices = node.inputs[0].producer(), constant_ints(node.inputs[1])
        if shape_node is None or shape_node.op_type != "Shape" or indices is None or shape_node.inputs[0] is None:
            return None
        source = shape_node.inputs[0]
        if int_attribute_or_none(shape_node, "start", 0) != 0 or self.rank(source) is not None:
            return None
        return tuple(self._axis_symbol(source, index) for index in indices)


def _is_declared_static(value: ir.Value) -> bool:
    """Return whether the declared shape is all that can be inferred: it has only numbers, and no elements are tracked."""
    shape = value.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return False
    return len(shape) > 1 or (value.dtype is not None and value.dtype not in SHAPE_DTYPES)
