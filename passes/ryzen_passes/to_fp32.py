"""Conversion of a model in half precision or float64 to fp32; graph inputs and outputs keep their types by default."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import annotate_types, element_types
from ryzen_compile.ir.edit.fp32_conversion import convert_to_fp32
from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset, insert_after, make_cast, remove_noop_casts
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv_cache_dtypes import record_state_dtypes, static_cache_states


def to_fp32(model: ir.Model, dtypes: frozenset[ir.DataType], *, io: bool) -> Change:
    """Convert all tensors of the types `dtypes` in `model` to fp32, in place.

    Graph inputs and outputs keep their types unless `io`; static KV cache states are converted in either case.
    """
    graph, types = model.graph, element_types(model)
    states = () if io else static_cache_states(model, types, dtypes)
    record_state_dtypes(model, states, ir.DataType.FLOAT)
    io_dtypes = {value: dtype for value in (*graph.inputs, *graph.outputs) if (dtype := value.dtype) and dtype in dtypes}
    weights = [name for name, value in graph.initializers.items() if value.dtype in dtypes]
    converted_nodes = convert_to_fp32(model, dtypes)
    if not (converted_nodes or weights or io_dtypes):
        return Change(summary=f"no tensor has the type {' or '.join(sorted(str(dtype.numpy()) for dtype in dtypes))}")
    annotate_types({value: ir.DataType.FLOAT if dtype in dtypes else dtype for value, dtype in types.items()})
    for state in states:
        del io_dtypes[state.past], io_dtypes[state.present]
    inserted = [] if io else _restore_io_dtypes(model, io_dtypes)
    removed = [node.name or "" for node in remove_noop_casts(graph, tuple(graph))]
    changed = [node.name or node.op_type for node in converted_nodes if node.graph is not None]
    return Change(
        changed=(*changed, *weights) or tuple(str(value.name) for value in io_dtypes),
        inserted=tuple(inserted),
        removed=tuple(removed),
        summary=f"{len(changed)} nodes and {len(weights)} weights converted to fp32, {len(inserted)} casts inserted",
    )


def _restore_io_dtypes(model: ir.Model, io_dtypes: Mapping[ir.Value, ir.DataType]) -> list[str]:
    """Restore the types of graph inputs and outputs with casts to or from fp32; return the names of the casts."""
    graph, names, inserted = model.graph, NameAllocator(model), []
    ensure_standard_opset(model)
    for value in graph.inputs:
        if (dtype := io_dtypes.get(value)) is not None:
            value.type = ir.TensorType(dtype)
            if uses := list(value.uses()):
                node = make_cast(value, ir.DataType.FLOAT, names.allocate(f"{value.name}.fp32"))
                insert_after(value, [node], graph)
                inserted.append(node)
                for consumer, index in uses:
                    consumer.replace_input_with(index, node.outputs[0])
    for index, value in enumerate(graph.outputs):
        if (dtype := io_dtypes.get(value)) is not None and not value.is_graph_input():
            name = str(value.name)
            value.name = names.allocate(f"{name}.fp32")
            node = make_cast(value, dtype, names.allocate(f"{name}.{dtype.name.lower()}"))
            node.outputs[0].name = name
            insert_after(value, [node], graph)
            inserted.append(node)
            graph.outputs[index] = node.outputs[0]
    return [node.name or "" for node in inserted]
