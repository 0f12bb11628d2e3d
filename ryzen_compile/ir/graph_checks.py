"""Checks of a model while it is loaded: types that are supported, op schemas, references, and the size of its functions.

The analyses and passes rely on them: they read the operands and attributes of standard ops without further checks.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.analysis.op_schemas import find_violation, op_schema
from ryzen_compile.ir.traversal import GRAPH_ATTRIBUTE_TYPES, all_graphs, attribute_graphs, nested_graphs, top_level_graphs

EXPORT_AGAIN_HINT = "export the model again"
MAX_DIMS = 64
"""The maximum rank of a tensor, equal to numpy's limit."""
MAX_INLINED_NODES = 30_000
"""The maximum number of nodes that the calls of functions may add.

ONNX Runtime inlines all functions, in a time that grows with the square of the number of nodes: 5 s for 32,000.
"""
MAX_CALL_DEPTH = 100
"""The maximum nesting depth of function calls, equal to that of `onnx.checker`."""


def check_declarations(proto: onnx.ModelProto) -> None:
    """Raise ModelError for duplicate names, names that are not UTF-8, invalid opset versions, and types not supported."""
    graph = proto.graph
    for function in proto.functions:
        _check_utf8(function.name, function.domain, function.overload, *function.input, *function.output, *function.attribute)
    for imports in (proto.opset_import, *(function.opset_import for function in proto.functions)):
        for entry in imports:
            _check_utf8(entry.domain)
            if not 0 < entry.version < 2**31:
                raise ModelError(
                    f"the opset version {entry.version} of domain `{printable(entry.domain)}` is invalid",
                    hint=EXPORT_AGAIN_HINT,
                )
    if graph.sparse_initializer:
        raise ModelError("sparse initializers are not supported", hint="convert them to dense initializers")
    for kind, names in (("input", graph.input), ("output", graph.output), ("initializer", graph.initializer)):
        counts = collections.Counter(item.name for item in names)
        for name, count in counts.items():
            if count > 1:
                raise ModelError(f"{count} {kind}s have the name `{printable(name)}`", hint=EXPORT_AGAIN_HINT)
    for kind, values in (("input", graph.input), ("output", graph.output), ("value", graph.value_info)):
        for value in values:
            unsupported = _unsupported_type(value.type)
            if unsupported is not None:
                raise ModelError(
                    f"{kind} `{printable(value.name)}` is {unsupported}, which is valid ONNX but not supported: only "
                    "tensors and sequences of tensors are",
                    hint="export the model without maps, as with `zipmap=False` in the options of skl2onnx or onnxmltools",
                )


def _unsupported_type(type_: onnx.TypeProto) -> str | None:
    """Return a description of a type that has no tensor form, or None if it is supported."""
    kind = type_.WhichOneof("value")
    if kind == "map_type":
        return "a map"
    if kind == "opaque_type":
        return "of an opaque type"
    if kind in ("sequence_type", "optional_type"):
        inner = _unsupported_type(getattr(type_, kind).elem_type)
        return inner and f"{'a sequence' if kind == 'sequence_type' else 'an optional'} of {inner.replace('a map', 'maps')}"
    return None


def sort_graphs(model: ir.Model) -> bool:
    """Sort the nodes of graphs that are not sorted topologically, and return whether there was one.

    Raises ModelError if a value has no producer, the nodes form a cycle, or an attribute is an invalid reference.
    """
    if not model.graph.outputs:
        raise ModelError("the graph has no outputs", hint=EXPORT_AGAIN_HINT)
    unsorted = [
        graph
        for graph in top_level_graphs(model)
        if not _is_topologically_sorted(graph, set(), in_function=graph is not model.graph)
    ]
    for graph in unsorted:
        try:
            graph.sort()
        except ValueError:
            raise ModelError(f"the nodes of graph `{printable(graph.name)}` form a cycle", hint=EXPORT_AGAIN_HINT) from None
    return bool(unsorted)


def check_graphs(model: ir.Model) -> None:
    """Raise ModelError for an invalid graph.

    A graph is invalid if a value has more than 64 dimensions, if a node does not match the schema of its op, or if the calls of
    functions are recursive, too deep, or add too many nodes.
    """
    for value in _values(model):
        if value.shape is not None and len(value.shape) > MAX_DIMS:
            raise ModelError(
                f"value `{printable(value.name)}` has {len(value.shape)} dimensions: at most {MAX_DIMS} are supported",
                hint=EXPORT_AGAIN_HINT,
            )
    _check_schemas(model)
    _check_function_calls(model)


def make_node_names_unique(model: ir.Model) -> None:
    """Rename nodes that have the name of an earlier node of their graph, which ONNX allows and ONNX Runtime refuses."""
    for graph in all_graphs(model):
        used: set[str] = set()
        repeated = []
        for node in graph:
            if node.name in used:
                repeated.append(node)
            elif node.name:
                used.add(node.name)
        counts: dict[str, int] = {}
        for node in repeated:
            name = repeated_name = node.name or ""
            while name in used:
                counts[repeated_name] = counts.get(repeated_name, 1) + 1
                name = f"{repeated_name}_{counts[repeated_name]}"
            node.name = name
            used.add(name)


def _check_utf8(*texts: object) -> None:
    """Raise ModelError for names that are not UTF-8: protobuf returns them as bytes."""
    for text in texts:
        if isinstance(text, bytes):
            raise ModelError(f"the name {text!r} is not UTF-8", hint=EXPORT_AGAIN_HINT)


def _is_topologically_sorted(graph: ir.Graph, defined: set[ir.Value], *, in_function: bool) -> bool:
    defined.update(graph.inputs, graph.initializers.values())
    ordered = True
    _check_utf8(graph.name, *[value.name for value in (*graph.inputs, *graph.initializers.values())])
    for node in graph:
        _check_utf8(node.name, node.domain, node.op_type, *[value.name for value in node.outputs])
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.UNDEFINED:
                raise ModelError(
                    f"attribute `{printable(attr.name)}` of node `{printable(node.name)}` has no type", hint=EXPORT_AGAIN_HINT
                )
            if attr.is_ref() and (not in_function or attr.type in GRAPH_ATTRIBUTE_TYPES):
                place = "it is a graph" if in_function else "the node is in no function"
                raise ModelError(
                    f"attribute `{printable(attr.name)}` of {_node_label(node)} refers to a function's attribute, but {place}",
                    hint="export the model again, without functions",
                )
            if attr.type in GRAPH_ATTRIBUTE_TYPES:
                for inner in attribute_graphs(attr):
                    ordered &= _is_topologically_sorted(inner, defined, in_function=in_function)
        for value in node.inputs:
            if value is not None and value not in defined:
                if value.producer() is None:
                    raise ModelError(
                        f"{_node_label(node)} reads `{printable(value.name)}`, which has no producer", hint=EXPORT_AGAIN_HINT
                    )
                ordered = False
        defined.update(node.outputs)
    for value in graph.outputs:
        if value not in defined:
            raise ModelError(f"the graph output `{printable(value.name)}` has no producer", hint=EXPORT_AGAIN_HINT)
    return ordered


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from (*graph.inputs, *graph.outputs)
        for node in graph:
            yield from node.outputs


def _check_schemas(model: ir.Model) -> None:
    """Raise ModelError for a node that does not match the schema of its op, or a standard op without an opset."""
    functions = model.functions
    scopes = [(model.graph, model.opset_imports)] + [
        (function.graph, function.opset_imports) for function in functions.values()
    ]
    for top_level, opsets in scopes:
        for graph in nested_graphs(top_level):
            for node in graph:
                is_standard = node.domain in ("", "ai.onnx")
                opset = opsets.get("", opsets.get("ai.onnx")) if is_standard else opsets.get(node.domain)
                if opset is None and is_standard:
                    raise ModelError(
                        f"{_node_label(node)} is a standard op, and the model imports no opset of the standard ops",
                        hint=EXPORT_AGAIN_HINT,
                    )
                if opset is None or node.op_identifier() in functions:
                    continue
                schema = op_schema(node.domain, node.op_type, opset)
                if schema is not None and (violation := find_violation(node, schema)) is not None:
                    raise ModelError(f"{_node_label(node)} {violation} in opset {opset}", hint=EXPORT_AGAIN_HINT)


def _check_function_calls(model: ir.Model) -> None:
    """Raise ModelError if inlining the functions would not end, or would add more than `MAX_INLINED_NODES` nodes."""
    if not model.functions:
        return
    sizes: dict[ir.OperatorIdentifier, int] = {}
    depths: dict[ir.OperatorIdentifier, int] = {}
    calls = {
        identifier: collections.Counter(node.op_identifier() for node in function.all_nodes())
        for identifier, function in model.functions.items()
    }
    stack = list(calls)
    active: set[ir.OperatorIdentifier] = set()
    while stack:
        identifier = stack[-1]
        missing = [callee for callee in calls[identifier] if callee in calls and callee not in sizes]
        if identifier in sizes:
            stack.pop()
        elif not missing:
            sizes[identifier] = sum(sizes.get(callee, 1) * count for callee, count in calls[identifier].items())
            depths[identifier] = 1 + max((depths.get(callee, 0) for callee in calls[identifier]), default=0)
            active.discard(stack.pop())
        elif identifier in active:
            raise ModelError("the model's functions call each other in a cycle", hint=EXPORT_AGAIN_HINT)
        else:
            active.add(identifier)
            stack.extend(missing)
    added = sum(sizes.get(node.op_identifier(), 0) for node in model.graph.all_nodes())
    if added > MAX_INLINED_NODES:
        raise ModelError(
            f"the calls of its functions add {added} nodes when they are inlined: at most {MAX_INLINED_NODES} are supported",
            hint="export the model without functions, or with functions that call each other less often",
        )
    if max(depths.values()) > MAX_CALL_DEPTH:
        raise ModelError(
            f"its functions call each other {max(depths.values())} levels deep: at most {MAX_CALL_DEPTH} are supported",
            hint="export the model without functions",
        )


def _node_label(node: ir.Node) -> str:
    if node.name or not node.outputs:
        return f"node `{printable(node.name or '')}` ({printable(node.op_type)})"
    return f"the {printable(node.op_type)} of `{printable(node.outputs[0].name)}`"
