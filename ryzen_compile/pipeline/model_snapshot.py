"""Model snapshots: the structure of a model at one time, to detect whether a pass changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import printable
from ryzen_compile.ir.gc_pause import gc_paused

if TYPE_CHECKING:
    import onnx_ir as ir


class ModelSnapshot:
    """The structure of a model: inputs, outputs, nodes in order, weights, opsets, functions and metadata.

    A snapshot shares the weights of the model. Names of values between nodes, their types and shapes, and documentation are not
    part of it; nor are the elements of a weight that is modified in place.
    """

    def __init__(self, model: ir.Model) -> None:
        with gc_paused():
            self._sections = _sections(model)

    def difference(self, model: ir.Model) -> str | None:
        """Return the first difference of `model` from the snapshot in a few words, or None if the structure is the same."""
        with gc_paused():
            sections = _sections(model)
        for name, content in self._sections.items():
            if sections[name] == content:
                continue
            return _node_difference(content, sections[name]) if name == "nodes" else f"its {name} differ"
        return None


class _TensorContent:
    """A tensor that is compared by identity first, and by its elements only if another object took its place."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: ir.TensorProtocol | None) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _TensorContent):
            return NotImplemented
        mine, theirs = self.tensor, other.tensor
        if mine is theirs:
            return True
        if mine is None or theirs is None:
            return False
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            return False
        if mine.dtype.name == "STRING":
            return bool((mine.numpy() == theirs.numpy()).all())
        return mine.tobytes() == theirs.tobytes()

    __hash__ = None  # type: ignore[assignment]


def _sections(model: ir.Model) -> dict[str, Any]:
    graph = model.graph
    indices: dict[int, int] = {}
    return {
        "inputs": [_describe_value(value) for value in graph.inputs],
        "weights": {name: _TensorContent(value.const_value) for name, value in graph.initializers.items()},
        "nodes": _graph_content(graph, indices)[1:],
        "outputs": [(indices.get(id(value), -1), _describe_value(value)) for value in graph.outputs],
        "opsets": dict(model.opset_imports),
        "functions": {str(name): _graph_content(function.graph, {}) for name, function in model.functions.items()},
        "metadata": (dict(model.metadata_props), dict(graph.metadata_props)),
    }


def _describe_value(value: ir.Value) -> tuple[str | None, str, str]:
    return value.name, str(value.type), str(value.shape)


def _graph_content(graph: ir.Graph, indices: dict[int, int]) -> list[Any]:
    """Return the number of inputs and the content of each node; values are numbered in `indices` in order of definition."""
    for value in (*graph.inputs, *graph.initializers.values()):
        indices[id(value)] = len(indices)
    content: list[Any] = [len(graph.inputs)]
    for node in graph:
        inputs = [None if value is None else indices.get(id(value), -1) for value in node.inputs]
        outputs = node.outputs
        attributes = node.attributes
        settings = (
            {name: _attribute_content(attribute, indices) for name, attribute in attributes.items()} if attributes else None
        )
        content.append((node.name, node.op_identifier(), inputs, len(outputs), settings))
        for value in outputs:
            indices[id(value)] = len(indices)
    return content


def _attribute_content(attribute: ir.Attr, indices: dict[int, int]) -> Any:
    import onnx_ir as ir

    kind = attribute.type
    if attribute.is_ref():
        return kind, attribute.ref_attr_name
    if kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.INTS, ir.AttributeType.STRING):
        return kind, attribute.value
    if kind == ir.AttributeType.GRAPH:
        return _subgraph_content(attribute.value, indices)
    if kind == ir.AttributeType.GRAPHS:
        return [_subgraph_content(graph, indices) for graph in attribute.value]
    if kind == ir.AttributeType.TENSOR:
        return _TensorContent(attribute.value)
    if kind == ir.AttributeType.TENSORS:
        return [_TensorContent(tensor) for tensor in attribute.value]
    if kind in (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS):
        return kind, str(attribute.value)
    return kind, attribute.value


def _subgraph_content(graph: ir.Graph, indices: dict[int, int]) -> list[Any]:
    content = _graph_content(graph, indices)
    weights = [(name, _TensorContent(value.const_value)) for name, value in graph.initializers.items()]
    return [content, weights, [indices.get(id(value), -1) for value in graph.outputs]]


def _node_difference(before: Sequence[Any], after: Sequence[Any]) -> str:
    for old, new in zip(before, after, strict=False):
        if old[:2] != new[:2]:
            return f"node {_node_label(new)} is in the place of node {_node_label(old)}"
        if old != new:
            return f"node {_node_label(old)} has other inputs, outputs or attributes"
    return f"it has {len(after)} nodes instead of {len(before)}"


def _node_label(content: Sequence[Any]) -> str:
    name, (_, op_type, _), *_ = content
    return f"`{printable(name or '')}` [{op_type}]"
