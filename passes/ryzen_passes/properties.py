"""Model properties that the passes of this package require, ensure and invalidate, each with its check."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ryzen_compile.spec.properties import Property

if TYPE_CHECKING:
    import onnx_ir as ir


def _check_no_dead_nodes(model: ir.Model) -> str | None:
    # A graph is acyclic: if every node has a used output, a path leads from every node to a graph output.
    from ryzen_compile.ir.traversal import top_level_graphs

    for graph in top_level_graphs(model):
        for node in graph.all_nodes():
            if not any(output.is_graph_output() or output.uses() for output in node.outputs):
                return f"no output of `{node.name or node.op_type}` is used"
    return None


GRAPH_LIVE = Property("graph/live", "every node contributes to a graph output", _check_no_dead_nodes)


def _check_types_absent(model: ir.Model, dtypes: Collection[ir.DataType]) -> str | None:
    """Return where a node computes in one of `dtypes`; casts at the inputs and outputs of the graph may convert them."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.constants import int_attribute_or_none
    from ryzen_compile.ir.analysis.element_types import DTYPE_ATTRIBUTES, is_standard_op
    from ryzen_compile.ir.traversal import all_graphs

    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)):
            if value.dtype in dtypes and not _is_only_cast_at_io(value):
                return f"`{value.name}` is {value.dtype}"
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type.name == "TENSOR" and not attribute.is_ref() and attribute.value.dtype in dtypes:
                    return f"`{node.name or node.op_type}` has an attribute tensor of type {attribute.value.dtype}"
            dtype_attribute = DTYPE_ATTRIBUTES.get(node.op_type) if is_standard_op(node) else None
            if dtype_attribute is None or _is_only_cast_at_io(node.outputs[0]):
                continue
            dtype = int_attribute_or_none(node, dtype_attribute, 0)
            if dtype is not None and dtype in dtypes:
                return f"`{node.name or node.op_type}` has the attribute {dtype_attribute}={ir.DataType(dtype)}"
    return None


def _is_only_cast_at_io(value: ir.Value) -> bool:
    if value.is_graph_input():
        return all(node.op_type == "Cast" for node in value.consumers())
    producer = value.producer()
    return value.is_graph_output() and not value.uses() and producer is not None and producer.op_type == "Cast"


def _check_no_half_precision(model: ir.Model) -> str | None:
    from ryzen_compile.ir.analysis.element_types import HALF_TYPES

    return _check_types_absent(model, HALF_TYPES)


def _check_no_float64(model: ir.Model) -> str | None:
    import onnx_ir as ir

    return _check_types_absent(model, {ir.DataType.DOUBLE})


TYPES_FLOAT32 = Property(
    "types/float32",
    "no node computes in half precision: only casts read half-precision inputs, only casts produce half-precision outputs",
    _check_no_half_precision,
)
TYPES_NO_FLOAT64 = Property(
    "types/no-float64",
    "no node computes in float64: only casts read float64 inputs, only casts produce float64 outputs",
    _check_no_float64,
)


def _check_static_caches(model: ir.Model) -> str | None:
    from ryzen_compile.ir.patterns import PatternNotMatched
    from ryzen_passes.kv.static.cache_view import read_static_cache_view

    try:
        read_static_cache_view(model)
    except PatternNotMatched as error:
        return error.reason
    return None


KV_STATIC = Property(
    "kv/static", "every KV cache is a state with a fixed number of slots, as `kv-static` produces it", _check_static_caches
)


def _check_dense_caches(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import read_kv_cache_spec

    spec = read_kv_cache_spec(model)
    for layer in spec.layers if spec is not None else ():
        if layer.method is not None:
            return f"the KV cache of `{layer.attention_node}` keeps or reads only some tokens (method `{layer.method}`)"
    return None


KV_DENSE = Property(
    "kv/dense", "every KV cache keeps all tokens that attention reads, and attention reads all of them", _check_dense_caches
)


def _check_unquantized_caches(model: ir.Model) -> str | None:
    from ryzen_compile.spec.kv_cache import read_kv_cache_spec

    spec = read_kv_cache_spec(model)
    for layer in spec.layers if spec is not None else ():
        for tensor_name, side in (("keys", layer.key), ("values", layer.value)):
            if side.quantization is not None:
                storage_type = side.quantization.storage_type
                return f"the KV cache of `{layer.attention_node}` stores its {tensor_name} quantized as {storage_type}"
    return None


KV_UNQUANTIZED = Property("kv/unquantized", "keys and values are stored unquantized", _check_unquantized_caches)
