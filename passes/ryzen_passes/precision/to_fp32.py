"""The rewrite to fp32: what computes in half precision computes in fp32, and the border keeps its types."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import declare, element_types
from ryzen_compile.ir.edit.insertion import Names, cast, drop_idle_casts, import_standard_ops, place_behind
from ryzen_compile.ir.edit.upcast import widen
from ryzen_compile.spec.passes import Change
from ryzen_passes.precision.cache_dtypes import kept_of, tell


def to_single(model: ir.Model, halves: frozenset[ir.DataType], *, io: bool) -> Change:
    """Widen what is of the types `halves` in `model`, in place; inputs and outputs keep their types unless `io`.

    Keys and values that live across steps are widened with what computes them.
    """
    graph, types = model.graph, element_types(model)
    states = () if io else kept_of(model, types, halves)
    tell(model, states, ir.DataType.FLOAT)
    border = {value: dtype for value in (*graph.inputs, *graph.outputs) if (dtype := value.dtype) and dtype in halves}
    held = [name for name, value in graph.initializers.items() if value.dtype in halves]
    touched = widen(model, halves)
    if not (touched or held or border):
        return Change(says="nothing is in half precision")
    declare({value: ir.DataType.FLOAT if dtype in halves else dtype for value, dtype in types.items()})
    for one in states:
        del border[one.past], border[one.present]
    inserted = [] if io else _keep_border(model, border)
    removed = [node.name or "" for node in drop_idle_casts(graph, tuple(graph))]
    changed = [node.name or node.op_type for node in touched if node.graph is not None]
    return Change(
        changed=(*changed, *held) or tuple(str(value.name) for value in border),
        inserted=tuple(inserted),
        removed=tuple(removed),
        says=f"{len(changed)} nodes and {len(held)} weights went from half precision to fp32, with {len(inserted)} casts",
    )


def _keep_border(model: ir.Model, border: Mapping[ir.Value, ir.DataType]) -> list[str]:
    """Give inputs and outputs their types back, with a cast to or from fp32; return the casts."""
    graph, names, inserted = model.graph, Names(model), []
    import_standard_ops(model)
    for value in graph.inputs:
        if (dtype := border.get(value)) is not None:
            value.type = ir.TensorType(dtype)
            if readers := list(value.uses()):
                node = cast(value, ir.DataType.FLOAT, names.new(f"{value.name}.fp32"))
                place_behind(value, [node], graph)
                inserted.append(node)
                for reader, index in readers:
                    reader.replace_input_with(index, node.outputs[0])
    for index, value in enumerate(graph.outputs):
        if (dtype := border.get(value)) is not None and not value.is_graph_input():
            name = str(value.name)
            value.name = names.new(f"{name}.fp32")
            node = cast(value, dtype, names.new(f"{name}.{dtype.name.lower()}"))
            node.outputs[0].name = name
            place_behind(value, [node], graph)
            inserted.append(node)
            graph.outputs[index] = node.outputs[0]
    return [node.name or "" for node in inserted]
