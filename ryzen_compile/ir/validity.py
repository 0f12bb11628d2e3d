"""The check of a graph with `onnx.checker`, with full shape inference and without its weights.

These constructs are valid but refused by the checker, so they are not checked: inputs and outputs of unknown rank, the ops that
ONNX Runtime adds to the standard domain, such as SimplifiedLayerNormalization, or LayerNormalization in an early opset, and
MeanVarianceNormalization with its default `axes`. Weights are replaced with values of their type and shape; small ones stay,
because shapes depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableSequence

import onnx

from ryzen_compile.errors import printable
from ryzen_compile.ir.analysis.op_schemas import op_schema

_OPAQUE_DOMAIN = "ryzen.unchecked"
"""A domain without schemas: the checker checks the names of its nodes, and nothing else."""

_ADDED_IN_EARLIER_OPSETS = frozenset({"LayerNormalization", "ThresholdedRelu"})
"""The standard ops that ONNX Runtime also has in opsets in which the standard does not have them."""

_ALLOWED_VALUES = {
    ("Attention", "qk_matmul_output_mode"): range(4),
    ("Attention", "softmax_precision"): (1, 10, 11, 16),
}
"""(op, attribute) -> the values that the op defines."""
_EQUATION = re.compile(rb"[A-Za-z,.\-> ]*")
"""Shape inference does not end for an equation with other characters."""

_CHECKER_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, IndexError, RuntimeError)
"""What the checker and the shape inference raise: the last three for exceptions of the C++ library, such as an unknown type."""


def find_invalidity(proto: onnx.ModelProto) -> str | None:
    """Return why `onnx.checker` refuses a model, on one line, or None if it is valid.

    `proto` is not changed. Its external tensors need no files.
    """
    copy = _checkable_copy(proto)
    problem = _find_op_of_later_opset(copy) or _find_invalid_attribute(copy) or find_contradicting_output(proto.graph)
    if problem is not None:
        return problem
    try:
        onnx.checker.check_model(copy.SerializeToString(), full_check=True)
    except _CHECKER_ERRORS as error:
        return _one_line(error)
    return None


def _find_op_of_later_opset(proto: onnx.ModelProto) -> str | None:
    """Return why a node of the main graph or of a nested one is invalid in the standard opset of the model, or None."""
    opset = _standard_opset(proto.opset_import)
    for graph in _nested_graphs(proto.graph):
        for node in graph.node:
            if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type) and op_schema("", node.op_type, opset) is None:
                history = onnx.defs.get_all_schemas_with_history()
                first = min(each.since_version for each in history if (each.domain, each.name) == ("", node.op_type))
                return f"the op {printable(node.op_type)} exists from opset {first} on, and the model imports opset {opset}"
    return None


def _find_invalid_attribute(proto: onnx.ModelProto) -> str | None:
    """Return which attribute of a standard op has a value that the op does not define, and the checker does not refuse."""
    for node in _standard_nodes(proto):
        for attribute in node.attribute:
            allowed = _ALLOWED_VALUES.get((node.op_type, attribute.name))
            if allowed is not None and not attribute.ref_attr_name and attribute.i not in allowed:
                values = ", ".join(map(str, allowed))
                return f"{attribute.name} of {node.op_type} is {attribute.i}, and the op defines {values}"
            if (node.op_type, attribute.name) == ("Einsum", "equation") and not _EQUATION.fullmatch(attribute.s):
                return f"the equation of an Einsum has invalid characters: {printable(attribute.s.decode(errors='replace'))}"
    return None


def _standard_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the standard domain in the main graph, in functions and in nested graphs."""
    node_lists = [proto.graph.node, *(function.node for function in proto.functions)]
    node_lists += [graph.node for nodes in node_lists for node in nodes for graph in _graphs_of(node)]
    for nodes in node_lists:
        yield from (node for node in nodes if node.domain in ("", "ai.onnx"))


def find_contradicting_output(graph: onnx.GraphProto) -> str | None:
    """Return which output is an input or a weight with another type or rank, which the checker does not compare."""
    declared = {value.name: (value.type.tensor_type.elem_type, _rank(value)) for value in graph.input}
    declared |= {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in graph.initializer}
    for value in graph.output:
        if value.name not in declared or not value.type.HasField("tensor_type"):
            continue
        dtype, rank = declared[value.name]
        is_of_other_rank = None not in (rank, _rank(value)) and rank != _rank(value)
        if value.type.tensor_type.elem_type != dtype or is_of_other_rank:
            return f"the output {printable(value.name)} is an input or a weight that is declared with another type"
    return None


def _rank(value: onnx.ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) if tensor.HasField("shape") else None


def find_repeated_node_name(proto: onnx.ModelProto) -> str | None:
    """Return the name of two nodes of one graph, which ONNX Runtime refuses, or None."""
    for graph in _nested_graphs(proto.graph):
        names: set[str] = set()
        for node in graph.node:
            if node.name in names:
                return str(node.name)
            if node.name:
                names.add(node.name)
    return None


def without_declared_shapes(proto: onnx.ModelProto, *, outputs: bool) -> onnx.ModelProto:
    """Return a copy of a model without the declared types of inner values and, with `outputs`, the shapes of outputs.

    The outputs of subgraphs are inner values.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in _nested_graphs(copy.graph):
        del graph.value_info[:]
        for value in graph.output if outputs or graph is not copy.graph else ():
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    return copy


def infer_output_shapes(proto: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Return the shapes of the outputs whose rank can be inferred, by name, whatever shapes are declared.

    A dim is its size, its name, or None.
    """
    copy = _checkable_copy(without_declared_shapes(proto, outputs=True))
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except _CHECKER_ERRORS:
        return {}
    outputs = {value.name for value in proto.graph.output}
    return {
        value.name: [getattr(dim, dim.WhichOneof("value") or "", None) for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.output)
        if value.name in outputs and value.type.tensor_type.HasField("shape")
    }


def _checkable_copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model in which everything that is not checked is opaque."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.opset_import.add(domain=_OPAQUE_DOMAIN, version=1)
    opset = _standard_opset(copy.opset_import)
    _hide_inputs_and_outputs_of_unknown_rank(copy.graph)
    for graph in _nested_graphs(copy.graph):
        _hide_initializers(graph, is_main=graph is copy.graph)
        graph.value_info.extend(_hide_tensor_attributes(graph.node))
        _hide_unchecked_ops(graph.node, opset)
    for function in copy.functions:
        function.opset_import.add(domain=_OPAQUE_DOMAIN, version=1)
        for nodes in (function.node, *(graph.node for node in function.node for graph in _graphs_of(node))):
            _hide_tensor_attributes(nodes)
            _hide_unchecked_ops(nodes, _standard_opset(function.opset_import))
    return copy


def _one_line(error: Exception) -> str:
    """Return the message of the checker without repetitions of its type."""
    return printable(" ".join(str(error).split())).replace("[ShapeInferenceError] Inference error(s): ", "")


def _standard_opset(imports: MutableSequence[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), 1)


def _nested_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _graphs_of(node)


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs of a node's attributes, at any depth."""
    for attribute in node.attribute:
        for graph in (attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            yield from _nested_graphs(graph)


def _insert_opaque_node(graph: onnx.GraphProto, output: str) -> None:
    graph.node.insert(0, onnx.NodeProto(op_type="Opaque", domain=_OPAQUE_DOMAIN, output=[output]))


def _hide_inputs_and_outputs_of_unknown_rank(graph: onnx.GraphProto) -> None:
    """Turn inputs of unknown rank into outputs of opaque nodes, and outputs of unknown rank into inner values."""
    inputs, outputs = _remove_of_unknown_rank(graph.input), _remove_of_unknown_rank(graph.output)
    for value in inputs:
        _insert_opaque_node(graph, value.name)
    names = {value.name for value in graph.value_info}
    graph.value_info.extend(value for value in (*inputs, *outputs) if value.name not in names)


def _remove_of_unknown_rank(values: MutableSequence[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    """Remove and return the tensors of `values` that have no shape."""
    indices = [
        index
        for index, value in enumerate(values)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    return [values.pop(index) for index in reversed(indices)]


def _hide_initializers(graph: onnx.GraphProto, *, is_main: bool) -> None:
    """Replace external initializers with values of their type and shape.

    They become inputs of the main graph, and outputs of opaque nodes in other graphs.
    """
    inputs = {value.name for value in graph.input}
    external = [index for index, tensor in enumerate(graph.initializer) if _is_external(tensor)]
    for index in reversed(external):
        tensor = graph.initializer.pop(index)
        if tensor.name in inputs:
            continue
        if is_main:
            graph.input.append(_value_info(tensor.name, tensor))
        else:
            graph.value_info.append(_value_info(tensor.name, tensor))
            _insert_opaque_node(graph, tensor.name)


def _hide_tensor_attributes(nodes: MutableSequence[onnx.NodeProto]) -> list[onnx.ValueInfoProto]:
    """Make Constant nodes with external tensors opaque, and the external tensors of other nodes empty.

    Return the types of the outputs of the Constant nodes.
    """
    outputs = []
    for node in nodes:
        tensors = [tensor for attribute in node.attribute for tensor in (attribute.t, *attribute.tensors)]
        if not any(map(_is_external, tensors)):
            continue
        if node.op_type == "Constant":
            outputs.append(_value_info(node.output[0], tensors[0]))
            node.domain, node.op_type = _OPAQUE_DOMAIN, "Opaque"
            del node.attribute[:]
        for tensor in filter(_is_external, tensors):
            tensor.CopyFrom(onnx.TensorProto(data_type=tensor.data_type, dims=[0]))
    return outputs


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _value_info(name: str, tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def _hide_unchecked_ops(nodes: MutableSequence[onnx.NodeProto], opset: int) -> None:
    """Move the nodes of the standard domain that the checker cannot check in this opset to the opaque domain."""
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        is_standard = onnx.defs.has(node.op_type) and node.op_type not in _ADDED_IN_EARLIER_OPSETS
        is_defined = is_standard or op_schema("", node.op_type, opset) is not None
        if not is_defined or (node.op_type == "MeanVarianceNormalization" and not node.attribute):
            node.domain = _OPAQUE_DOMAIN
