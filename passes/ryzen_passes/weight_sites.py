"""Weights that a product or a lookup reads, with the axis along which each is divided into blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.analysis.element_types import is_standard_op

MIN_ELEMENTS = 4096
"""Smaller weights are left: their codes save little."""
_FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


ReadKind = Literal["product", "lookup", "convolution"]


@dataclass(frozen=True, kw_only=True)
class WeightRead:
    """An input through which a node reads a weight."""

    node: ir.Node
    index: int
    kind: ReadKind
    activations: tuple[ir.Value, ...] = ()
    """The tensors (..., length) whose rows are multiplied by the weight; empty if the product is of another kind."""


@dataclass(frozen=True, kw_only=True)
class WeightSite:
    """A weight whose readers agree on the axis along which products are summed."""

    weight: ir.Value
    axis: int
    """The axis along which products are summed; of a convolution, 0 is the axis of its output channels."""
    reads: tuple[WeightRead, ...]

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The values of the weight."""
        tensor = self.weight.const_value
        if tensor is None:
            raise ValueError(f"{self.weight.name} is not an initializer")
        return tensor

    @property
    def length(self) -> int:
        """The number of elements that a product sums over."""
        shape = self.tensor.shape.numpy()
        return math.prod(shape[1:]) if self.is_convolution else shape[self.axis]

    @property
    def is_product_matrix(self) -> bool:
        """Whether it is a matrix that nodes only multiply by."""
        return len(self.tensor.shape) == 2 and all(read.kind == "product" for read in self.reads)

    @property
    def is_convolution(self) -> bool:
        """Whether the weight is that of convolutions."""
        return any(read.kind == "convolution" for read in self.reads)


@dataclass(frozen=True, kw_only=True)
class SkippedWeight:
    """A large weight that passes leave as it is."""

    weight: ir.Value
    reason: str


def find_weights(model: ir.Model, skip: Sequence[str] = ()) -> Iterator[WeightSite | SkippedWeight]:
    """Yield the weights of the main graph with at least MIN_ELEMENTS elements and two axes, in the order of their names.

    Those that a node reads whose name or op type matches a pattern of `skip` are skipped.
    """
    for name, weight in sorted(model.graph.initializers.items()):
        tensor = weight.const_value
        if tensor is None or tensor.dtype not in _FLOAT_TYPES or tensor.size < MIN_ELEMENTS or len(tensor.shape) < 2:
            continue
        if weight.is_graph_input() or weight.is_graph_output():
            yield SkippedWeight(weight=weight, reason=f"`{name}` is an input or an output of the graph")
            continue
        yield _site(weight, len(tensor.shape), skip)


def _site(weight: ir.Value, rank: int, skip: Sequence[str]) -> WeightSite | SkippedWeight:
    axes: set[int] = set()
    reads: list[WeightRead] = []
    for node, index in weight.uses():
        if any(fnmatchcase(name, pattern) for pattern in skip for name in (node.name or "", node.op_type)):
            return SkippedWeight(weight=weight, reason=f"`{node.name or node.op_type}` is in `skip`")
        if node.graph is not weight.graph:
            return SkippedWeight(weight=weight, reason=f"it is read in a subgraph, by `{node.name or node.op_type}`")
        axis, kind = _axis_of_read(node, index, rank)
        if axis is None or kind is None:
            return SkippedWeight(weight=weight, reason=f"it is read by `{node.name or node.op_type}`, a {node.op_type}")
        axes.add(axis)
        reads.append(WeightRead(node=node, index=index, kind=kind, activations=tuple(_activations(node, index))))
    if not reads:
        return SkippedWeight(weight=weight, reason="no node reads it")
    if len(axes) > 1 or len({read.kind == "convolution" for read in reads}) > 1:
        return SkippedWeight(weight=weight, reason="its readers sum over different axes")
    return WeightSite(weight=weight, axis=axes.pop(), reads=tuple(reads))


def _axis_of_read(node: ir.Node, index: int, rank: int) -> tuple[int | None, ReadKind | None]:
    """Return the axis of a weight of `rank` axes over which the product that reads it sums, and the kind of the read."""
    if _is_op(node, "MatMul"):
        return (rank - 2 if index == 1 else rank - 1), "product"
    if _is_op(node, "Gemm") and index < 2:
        transposed = int_attribute(node, "transB" if index == 1 else "transA", 0)
        return (1 if bool(transposed) == (index == 1) else 0), "product"
    if _is_op(node, "Gather") and index == 0 and rank == 2 and int_attribute(node, "axis", 0) in (0, -2):
        return 1, "lookup"
    if _is_op(node, "Conv") and index == 1:
        return 0, "convolution"
    if _is_op(node, "Transpose") and rank == 2 and not node.outputs[0].is_graph_output():
        inner = {_axis_of_read(user, position, 2) for user, position in node.outputs[0].uses() if user.graph is node.graph}
        if len(inner) == 1 and len(node.outputs[0].uses()) > 0:
            axis, kind = inner.pop()
            perm = node.attributes.get("perm")
            order = list(perm.as_ints()) if perm is not None else [1, 0]
            if axis is not None and kind == "product":
                return order[axis], "product"
    return None, None


def _is_op(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and is_standard_op(node)


def _activations(node: ir.Node, index: int) -> Iterator[ir.Value]:
    """Yield the tensors whose rows `node` multiplies by the weight that it reads as input `index`."""
    if _is_op(node, "Transpose"):
        for user, position in node.outputs[0].uses():
            yield from _activations(user, position)
        return
    is_product = _is_op(node, "MatMul") or (_is_op(node, "Gemm") and not int_attribute(node, "transA", 0))
    if is_product and index == 1 and node.inputs[0] is not None:
        yield node.inputs[0]
