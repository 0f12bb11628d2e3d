"""Large weights that a graph transposes, such as embeddings that are also the output projection.

ONNX Runtime computes ops on weights once, when it loads a graph. The result of a Transpose is a copy of the weight in memory,
although the product that reads it can read the weight itself in transposed order.
"""

from __future__ import annotations

import math

from ryzen_compile.errors import ModelError

_MIN_BYTES = 16 << 20


def max_folded_bytes(path: str) -> int | None:
    """Return the size in bytes above which results of ops on weights of the graph at `path` are not to be computed at load.

    It excludes transposed weights of at least 16 MB. None: there are none, or another op reads a weight as large, whose result
    must not be computed at every run. Ops in subgraphs are not considered.
    """
    import onnx

    from ryzen_compile.ir import protobuf_scan
    from ryzen_compile.ir.weight_files import resolve_model_file

    try:
        skeleton = protobuf_scan.read_skeleton(resolve_model_file(path))
    except ModelError:
        return None  # ONNX Runtime reports what is wrong with the file
    graph = onnx.ModelProto.FromString(skeleton.proto).graph
    sizes = {
        weight.name: math.prod(weight.dims) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in graph.initializer
        if weight.data_type != onnx.TensorProto.STRING
    }
    transposed: list[int] = []
    others: list[int] = []
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if not inputs or not all(name in sizes for name in inputs):
            continue
        size = max(sizes[name] for name in inputs)
        sizes |= dict.fromkeys(node.output, size)
        if size >= _MIN_BYTES:
            (transposed if node.op_type == "Transpose" else others).append(size)
    if not transposed or max(others, default=0) >= min(transposed):
        return None
    return min(transposed) - 1
