"""The facts that the passes of this room speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.spec.properties import Fact

if TYPE_CHECKING:
    import onnx_ir as ir


def _no_dead_node(model: ir.Model) -> str | None:
    # A graph has no cycles, so where every node has an output that is used, every node leads to an output of its graph.
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            if not any(output.is_graph_output() or output.uses() for output in node.outputs):
                return f"nothing uses what `{node.name or node.op_type}` computes"
    return None


GRAPH_LIVE = Fact("graph/live", "every node is needed by an output", _no_dead_node)


def _no_half_precision(model: ir.Model) -> str | None:
    from ryzen_compile.ir.analysis.element_types import HALVES

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for inner in (graph, *graph.subgraphs()):
            for value in (*inner.inputs, *inner.initializers.values(), *(value for node in inner for value in node.outputs)):
                if value.dtype in HALVES and not _is_border(value):
                    return f"`{value.name}` is {value.dtype}"
            for node in inner:
                for attribute in node.attributes.values():
                    if attribute.type.name == "TENSOR" and not attribute.is_ref() and attribute.value.dtype in HALVES:
                        return f"`{node.name or node.op_type}` holds {attribute.value.dtype}"
                if node.op_type == "Cast" and node.attributes["to"].value in HALVES and not _is_border(node.outputs[0]):
                    return f"`{node.name or node.op_type}` casts to half precision"
    return None


def _is_border(value: ir.Value) -> bool:
    if value.is_graph_input():
        return all(node.op_type == "Cast" for node in value.consumers())
    producer = value.producer()
    return value.is_graph_output() and not value.uses() and producer is not None and producer.op_type == "Cast"


TYPES_FLOAT32 = Fact(
    "types/float32",
    "nothing computes in half precision: inputs and outputs that are half are cast at once, and to the last",
    _no_half_precision,
)


def _caches_are_fixed(model: ir.Model) -> str | None:
    from ryzen_passes.kv.static.cache_view import read_fixed

    form = read_fixed(model)
    return form if isinstance(form, str) else None


KV_FIXED = Fact("kv/fixed", "every cache is a state of a fixed number of slots, as kv-static leaves it", _caches_are_fixed)


def _caches_are_whole(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import recorded

    told = recorded(model)
    for layer in told.layers if told is not None else ():
        if layer.method != "all":
            return f"`{layer.attention}` keeps or reads some tokens alone, by `{layer.method}`"
    return None


KV_DENSE = Fact("kv/dense", "no cache evicts or leaves out a token", _caches_are_whole)


def _caches_are_exact(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import recorded

    told = recorded(model)
    for layer in told.layers if told is not None else ():
        for word, side in (("keys", layer.key), ("values", layer.value)):
            if side.bits is not None:
                return f"`{layer.attention}` keeps its {word} as codes of {side.bits}"
    return None


KV_EXACT = Fact("kv/exact", "keys and values are kept as they are, not as codes", _caches_are_exact)
