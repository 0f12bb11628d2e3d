"""Clockwork: the part of a decoder that follows from sizes, masks and positions alone, and can be run without its weights.

What a mask hides and where a token stands is spelled differently by every exporter. It is told by running that part on small
numbers and looking at what comes out, not by how it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.backend import run_unoptimized
from ryzen_compile.errors import RyzenError
from ryzen_compile.ir.analysis.sizes import ShapeInference, Size, constant_tensor
from ryzen_compile.spec.interface import Interface, resolve_dim

Array = np.ndarray[Any, Any]

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
}
_POSITION_ROLES = ("mask", "positions")
_RANDOM_OPS = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})


class ProbeError(Exception):
    """What a value is cannot be told by running it; the text says why."""


class ProbeSizeError(ProbeError):
    """What a value is for these sizes cannot be told, as it cannot be run for them."""


class PositionSubgraph:
    """Which values of a graph follow from sizes, masks and positions, and what they are for given ones."""

    def __init__(self, model: ir.Model, interface: Interface, sizes: ShapeInference) -> None:
        """Read the graph; nothing is run yet."""
        self._model, self._sizes = model, sizes
        roles = {spec.name: spec.role for spec in interface.inputs}
        carried = {state.input: state for state in interface.states}
        self._past_dims = {
            str(spec.dims[state.append_axis])
            for spec in interface.inputs
            if (state := carried.get(spec.name)) is not None and state.append_axis is not None and spec.dims is not None
        }
        self.step_dependent: dict[ir.Value, bool] = {}
        """Every value of the clockwork, and whether it changes from step to step."""
        for value in model.graph.inputs:
            if roles.get(value.name or "") in _POSITION_ROLES:
                self.step_dependent[value] = True
        for value in model.graph.initializers.values():
            self.step_dependent.setdefault(value, False)
        for node in model.graph:
            self._classify_node(node)

    def _classify_node(self, node: ir.Node) -> None:
        if node.op_type in ("Shape", "Size") and node.domain == "" and node.inputs[0] not in self.step_dependent:
            self.step_dependent[node.outputs[0]] = self._may_grow(node)
            return
        inputs = [value for value in node.inputs if value is not None]
        held = any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
        )
        if (
            node.domain != ""
            or held
            or node.op_type in _RANDOM_OPS
            or not all(value in self.step_dependent for value in inputs)
        ):
            return
        timed = any(self.step_dependent[value] for value in inputs) and self._may_grow(node)
        if not self._past_dims and self._counts_tokens(node, inputs):
            timed = True
        self.step_dependent.update(dict.fromkeys(node.outputs, timed))

    def _may_grow(self, node: ir.Node) -> bool:
        """Whether what `node` gives may grow from step to step: it does not where it is known to be a vector of other sizes."""
        vector = self._sizes.int_values(node.outputs[0])
        return vector is None or any(self._depends_on_past(size) for size in vector)

    def _counts_tokens(self, node: ir.Node, inputs: list[ir.Value]) -> bool:
        """Whether `node` of a graph without caches counts tokens, or takes as many rows of a table as there are tokens."""
        if node.op_type not in ("Range", "Slice") or (node.op_type == "Slice" and not inputs[0].is_initializer()):
            return False
        return not all(value.is_initializer() or constant_tensor(value) is not None for value in inputs)

    def _depends_on_past(self, dim: Size) -> bool:
        if isinstance(dim, tuple):
            return dim[0] not in ("Add", "Sub", "Mul", "Div") or any(self._depends_on_past(part) for part in dim[1:])
        return isinstance(dim, str) and any(word.strip() in self._past_dims for word in dim.replace("*", "+").split("+"))

    def boundary_values(self) -> list[ir.Value]:
        """Return the timed values that something outside of the clockwork reads, in the order of the graph."""
        made = (value for node in self._model.graph for value in node.outputs)
        return [
            value
            for value in (*self._model.graph.inputs, *made)
            if self.step_dependent.get(value)
            and any(output not in self.step_dependent for node in value.consumers() for output in node.outputs)
        ]

    def run(self, value: ir.Value, sizes: Mapping[str, int], inputs: Mapping[ir.Value, Array]) -> Array:
        """Return what `value` is for these sizes of the named dims and these inputs; raises Unknown."""
        feeds: dict[str, Array] = {}
        weights: dict[str, onnx.TensorProto] = {}
        nodes: dict[ir.Node, None] = {}
        waiting, seen = [value], {value}
        while waiting:
            at = waiting.pop()
            if at in inputs:
                feeds[at.name or ""] = inputs[at]
                continue
            node = at.producer()
            if node is None:
                if at.const_value is None:
                    raise ProbeError(f"`{at.name}` is not known")
                weights[at.name or ""] = ir.to_proto(ir.tensor(at.const_value.numpy(), name=at.name))
                continue
            if node.op_type in ("Shape", "Size") and node.inputs[0] not in self.step_dependent:
                feeds[at.name or ""] = self._evaluate_shape(node, sizes)
                continue
            nodes[node] = None
            for one in node.inputs:
                if one is not None and one not in seen:
                    seen.add(one)
                    waiting.append(one)
        return evaluate(self._model, value, [node for node in self._model.graph if node in nodes], weights, feeds)

    def _evaluate_shape(self, node: ir.Node, sizes: Mapping[str, int]) -> Array:
        source = node.inputs[0]
        numbers = (
            [self._axis_size(source, axis, sizes) for axis in range(self._sizes.rank(source) or 0)]
            if source is not None
            else []
        )
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        numbers = numbers[start:end]
        if source is None or self._sizes.rank(source) is None or None in numbers:
            raise ProbeError(f"the shape of `{source.name if source else ''}` is not known")
        shape = np.array(numbers, np.int64)
        return shape if node.op_type == "Shape" else shape.prod()

    def _axis_size(self, value: ir.Value, axis: int, sizes: Mapping[str, int]) -> int | None:
        """Return the size of one axis of `value`, by what makes it or by its declared shape."""
        dims = self._sizes.dims(value)
        traced = _evaluate_dim(dims[axis], sizes) if dims is not None else None
        if traced is not None or value.shape is None:
            return traced
        declared = value.shape[axis]
        return (
            declared
            if isinstance(declared, int)
            else resolve_dim(declared.value, sizes)
            if declared.value is not None
            else None
        )


def evaluate(
    model: ir.Model,
    value: ir.Value,
    nodes: Sequence[ir.Node],
    weights: Mapping[str, onnx.TensorProto],
    feeds: Mapping[str, Array],
) -> Array:
    """Return what `nodes` of `model`, in order, make `value` for these weights and feeds, both by name; raises Unknown."""
    if not nodes:
        return feeds[value.name or ""] if value.name in feeds else onnx.numpy_helper.to_array(weights[value.name or ""])
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "clockwork",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ],
        [onnx.helper.make_value_info(value.name or "", onnx.TypeProto())],
        list(weights.values()),
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    try:
        return run_unoptimized(proto.SerializeToString(), feeds)
    except RyzenError as error:
        raise ProbeSizeError(f"`{value.name}` cannot be run: {error}") from error


def _evaluate_dim(dim: Size, sizes: Mapping[str, int]) -> int | None:
    """Return the size that a token stands for, given the sizes of the named dims; None where it does not say."""
    if isinstance(dim, (int, str)):
        return resolve_dim(dim, sizes)
    if not isinstance(dim, tuple) or dim[0] not in _ARITHMETIC:
        return None
    operation = _ARITHMETIC[str(dim[0])]
    one, two = (_evaluate_dim(part, sizes) for part in dim[1:])
    return None if one is None or two is None else operation(one, two)
