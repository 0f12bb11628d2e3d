"""Position subgraph: the part of a model that depends only on sizes, masks and positions, and runs without the weights.

Every exporter writes causal masks and positions with other nodes. They are therefore recognized by running the position
subgraph on small inputs and inspecting the results, not by matching nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.backends.onnxruntime.backend import run_unoptimized
from ryzen_compile.errors import RyzenError
from ryzen_compile.ir.analysis.constants import constant_tensor, shape_slice
from ryzen_compile.ir.analysis.op_traits import RANDOM_OPS
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_compile.spec.dims import resolve_dim
from ryzen_compile.spec.interface import Interface

Array = np.ndarray[Any, Any]

_POSITION_ROLES = ("mask", "positions")


class ProbeError(Exception):
    """A value of the position subgraph cannot be evaluated; the message gives the reason."""


class ProbeSizeError(ProbeError):
    """A value cannot be evaluated for the given sizes, because its nodes fail for them."""


class PositionSubgraph:
    """The values of a graph that depend only on sizes, masks and positions; evaluates them for given inputs."""

    def __init__(self, model: ir.Model, interface: Interface, sizes: ShapeInference) -> None:
        """Classify the values of the graph; run no node."""
        self._model, self._sizes = model, sizes
        roles = {spec.name: spec.role for spec in interface.inputs}
        growing_states = {state.input: state for state in interface.states}
        self._past_dims = {
            str(spec.dims[state.append_axis])
            for spec in interface.inputs
            if (state := growing_states.get(spec.name)) is not None and state.append_axis is not None and spec.dims is not None
        }
        self.step_dependent: dict[ir.Value, bool] = {}
        """Value of the position subgraph -> whether it may change from step to step."""
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
        if (
            node.domain != ""
            or node_subgraphs(node)
            or node.op_type in RANDOM_OPS
            or not all(value in self.step_dependent for value in inputs)
        ):
            return
        step_dependent = any(self.step_dependent[value] for value in inputs) and self._may_grow(node)
        if not self._past_dims and self._counts_tokens(node, inputs):
            step_dependent = True
        self.step_dependent.update(dict.fromkeys(node.outputs, step_dependent))

    def _may_grow(self, node: ir.Node) -> bool:
        """Return whether the output of `node` may change from step to step.

        It does not if it is known to be a vector of sizes that are independent of the past length.
        """
        vector = self._sizes.int_values(node.outputs[0])
        return vector is None or any(self._sizes.symbols.may_depend_on(size, self._past_dims) for size in vector)

    def _counts_tokens(self, node: ir.Node, inputs: list[ir.Value]) -> bool:
        """Return whether `node`, in a graph without caches, counts tokens or slices one table row per token."""
        if node.op_type not in ("Range", "Slice") or (node.op_type == "Slice" and not inputs[0].is_initializer()):
            return False
        return not all(value.is_initializer() or constant_tensor(value) is not None for value in inputs)

    def boundary_values(self) -> list[ir.Value]:
        """Return the step-dependent values that nodes outside of the position subgraph read, in graph order."""
        node_outputs = (value for node in self._model.graph for value in node.outputs)
        return [
            value
            for value in (*self._model.graph.inputs, *node_outputs)
            if self.step_dependent.get(value)
            and any(output not in self.step_dependent for node in value.consumers() for output in node.outputs)
        ]

    def run(self, value: ir.Value, sizes: Mapping[str, int], inputs: Mapping[ir.Value, Array]) -> Array:
        """Return `value`, evaluated for `sizes` of the named dims and for `inputs`.

        Raises ProbeError if `value` depends on other inputs or unknown shapes, and ProbeSizeError if it cannot be run for these
        sizes.
        """
        feeds: dict[str, Array] = {}
        weights: dict[str, onnx.TensorProto] = {}
        nodes: dict[ir.Node, None] = {}
        pending, visited = [value], {value}
        while pending:
            current = pending.pop()
            if current in inputs:
                feeds[current.name or ""] = inputs[current]
                continue
            node = current.producer()
            if node is None:
                if current.const_value is None:
                    raise ProbeError(f"`{current.name}` is not a known input")
                weights[current.name or ""] = ir.to_proto(ir.tensor(current.const_value.numpy(), name=current.name))
                continue
            if node.op_type in ("Shape", "Size") and node.inputs[0] not in self.step_dependent:
                feeds[current.name or ""] = self._evaluate_shape(node, sizes)
                continue
            nodes[node] = None
            for operand in node.inputs:
                if operand is not None and operand not in visited:
                    visited.add(operand)
                    pending.append(operand)
        return evaluate(self._model, value, [node for node in self._model.graph if node in nodes], weights, feeds)

    def _evaluate_shape(self, node: ir.Node, sizes: Mapping[str, int]) -> Array:
        source = node.inputs[0]
        axis_sizes = (
            [self._axis_size(source, axis, sizes) for axis in range(self._sizes.rank(source) or 0)]
            if source is not None
            else []
        )
        axis_sizes = axis_sizes[shape_slice(node)]
        if source is None or self._sizes.rank(source) is None or None in axis_sizes:
            raise ProbeError(f"the shape of `{source.name if source else ''}` is not known")
        shape = np.array(axis_sizes, np.int64)
        return shape if node.op_type == "Shape" else shape.prod()

    def _axis_size(self, value: ir.Value, axis: int, sizes: Mapping[str, int]) -> int | None:
        """Return the size of one axis of `value`, from shape inference or else from the declared shape; None if unknown."""
        dims = self._sizes.dims(value)
        inferred = self._sizes.evaluate(dims[axis], sizes) if dims is not None else None
        if inferred is not None or value.shape is None:
            return inferred
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
    """Return `value`, computed by `nodes` of `model` (in graph order) from `weights` and `feeds`, both by name.

    Raises ProbeSizeError if the nodes cannot be run.
    """
    if not nodes:
        return feeds[value.name or ""] if value.name in feeds else onnx.numpy_helper.to_array(weights[value.name or ""])
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "position_subgraph",
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
        raise ProbeSizeError(f"`{value.name}` cannot be evaluated: {error}") from error
