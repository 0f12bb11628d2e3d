"""The rewrite to fp32: what computes in half precision computes in fp32, and the border keeps its types."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import annotate_types, element_types
from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset, insert_after, make_cast, remove_noop_casts
from ryzen_compile.ir.edit.upcast import upcast_to_fp32
from ryzen_compile.spec.passes import Change
from ryzen_passes.precision.kv_cache_dtypes import record_state_dtypes, static_cache_states


def to_fp32(model: ir.Model, half_types: frozenset[ir.DataType], *, io: bool) -> Change:
    """Widen what is of the types `halves` in `model`, in place; inputs and outputs keep their types unless `io`.

    Keys and values that live across steps are widened with what computes them.
    """
    graph, types = model.graph, element_types(model)
    states = () if io else static_cache_states(model, types, half_types)
    record_state_dtypes(model, states, ir.DataType.FLOAT)
    border = {value: dtype for value in (*graph.inputs, *graph.outputs) if (dtype := value.dtype) and dtype in half_types}
    held = [name for name, value in graph.initializers.items() if value.dtype in half_types]
    touched = upcast_to_fp32(model, half_types)
    if not (touched or held or border):
        return Change(summary="nothing is in half precision")
    annotate_types({value: ir.DataType.FLOAT if dtype in half_types else dtype for value, dtype in types.items()})
    for one in states:
        del border[one.past], border[one.present]
    inserted = [] if io else _restore_io_dtypes(model, border)
    removed = [node.name or "" for node in remove_noop_casts(graph, tuple(graph))]
    changed = [node.name or node.op_type for node in touched if node.graph is not None]
    return Change(
        changed=(*changed, *held) or tuple(str(value.name) for value in border),
        inserted=tuple(inserted),
        removed=tuple(removed),
        summary=f"{len(changed)} nodes and {len(held)} weights went from half precision to fp32, with {len(inserted)} casts",
    )


def _restore_io_dtypes(model: ir.Model, io_dtypes: Mapping[ir.Value, ir.DataType]) -> list[str]:
    """Give inputs and outputs their types back, with a cast to or from fp32; return the casts."""
    graph, names, inserted = model.graph, NameAllocator(model), []
    ensure_standard_opset(model)
    for value in graph.inputs:
        if (dtype := io_dtypes.get(value)) is not None:
            value.type = ir.TensorType(dtype)
            if readers := list(value.uses()):
                node = make_cast(value, ir.DataType.FLOAT, names.allocate(f"{value.name}.fp32"))
                insert_after(value, [node], graph)
                inserted.append(node)
                for reader, index in readers:
                    reader.replace_input_with(index, node.outputs[0])
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
