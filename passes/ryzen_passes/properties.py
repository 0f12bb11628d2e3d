"""The facts that the passes of this room speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.spec.properties import Property

if TYPE_CHECKING:
    import onnx_ir as ir


def _check_no_dead_nodes(model: ir.Model) -> str | None:
    # A graph has no cycles, so where every node has an output that is used, every node leads to an output of its graph.
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            if not any(output.is_graph_output() or output.uses() for output in node.outputs):
                return f"nothing uses what `{node.name or node.op_type}` computes"
    return None


GRAPH_LIVE = Property("graph/live", "every node is needed by an output", _check_no_dead_nodes)


def _check_no_half_precision(model: ir.Model) -> str | None:
    from ryzen_compile.ir.analysis.element_types import HALF_TYPES

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for inner in (graph, *graph.subgraphs()):
            for value in (*inner.inputs, *inner.initializers.values(), *(value for node in inner for value in node.outputs)):
                if value.dtype in HALF_TYPES and not _is_only_cast_at_io(value):
                    return f"`{value.name}` is {value.dtype}"
            for node in inner:
                for attribute in node.attributes.values():
                    if attribute.type.name == "TENSOR" and not attribute.is_ref() and attribute.value.dtype in HALF_TYPES:
                        return f"`{node.name or node.op_type}` holds {attribute.value.dtype}"
                if (
                    node.op_type == "Cast"
                    and node.attributes["to"].value in HALF_TYPES
                    and not _is_only_cast_at_io(node.outputs[0])
                ):
                    return f"`{node.name or node.op_type}` casts to half precision"
    return None


def _is_only_cast_at_io(value: ir.Value) -> bool:
    if value.is_graph_input():
        return all(node.op_type == "Cast" for node in value.consumers())
    producer = value.producer()
    return value.is_graph_output() and not value.uses() and producer is not None and producer.op_type == "Cast"


TYPES_FLOAT32 = Property(
    "types/float32",
    "nothing computes in half precision: inputs and outputs that are half are cast at once, and to the last",
    _check_no_half_precision,
)


def _check_static_caches(model: ir.Model) -> str | None:
    from ryzen_passes.kv.static.cache_view import read_static_cache_view

    form = read_static_cache_view(model)
    return form if isinstance(form, str) else None


KV_STATIC = Property(
    "kv/fixed", "every cache is a state of a fixed number of slots, as kv-static leaves it", _check_static_caches
)


def _check_dense_caches(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import read_kv_cache_spec

    told = read_kv_cache_spec(model)
    for layer in told.layers if told is not None else ():
        if layer.method != "all":
            return f"`{layer.attention_node}` keeps or reads some tokens alone, by `{layer.method}`"
    return None


KV_DENSE = Property("kv/dense", "no cache evicts or leaves out a token", _check_dense_caches)


def _check_unquantized_caches(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import read_kv_cache_spec

    told = read_kv_cache_spec(model)
    for layer in told.layers if told is not None else ():
        for word, side in (("keys", layer.key), ("values", layer.value)):
            if side.storage_type is not None:
                return f"`{layer.attention_node}` keeps its {word} as codes of {side.storage_type}"
    return None


KV_UNQUANTIZED = Property("kv/exact", "keys and values are kept as they are, not as codes", _check_unquantized_caches)
