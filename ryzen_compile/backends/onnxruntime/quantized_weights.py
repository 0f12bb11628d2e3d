"""Quantized products that saturate on x64 CPUs without VNNI, and the form of a graph in which they do not.

There, ONNX Runtime adds two products of uint8 activations and int8 weights in 16 bits. With `session.x64quantprecision=1` it
converts the weights to uint8 when it loads a graph. It names a converted tensor after its source, and so refuses a graph where
two products share a weight or, as is common, a zero point; and it gives a weight without a zero point a single one, which a
DequantizeLinear with several scales does not take.
"""

from __future__ import annotations

import functools
import math
import platform
from collections import Counter
from typing import TYPE_CHECKING

from ryzen_compile.errors import ModelError
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.weight_files import resolve_model_file

if TYPE_CHECKING:
    import onnx

_QUANTIZING_OPS = (b"QuantizeLinear", b"QLinear", b"MatMulInteger", b"DynamicQuantize", b"QGemm", b"QAttention")
"""Parts of the names of ops that quantize activations or multiply quantized ones."""
_WEIGHT_INPUTS = {
    "DequantizeLinear": (0, 2),
    "MatMulInteger": (1, 3),
    "QLinearMatMul": (3, 5),
    "QLinearConv": (3, 5),
    "DynamicQuantizeMatMul": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "QGemm": (3, 5),
    "QAttention": (1, 7),
    "DynamicQuantizeLSTM": (1, 2, 9, 11),
}
"""The inputs that ONNX Runtime converts, weights and zero points, by op."""


def may_saturate(path: str) -> bool:
    """Return whether products of the graph at `path` may saturate on this CPU."""
    if not _cpu_saturates():
        return False
    try:
        proto = protobuf_scan.read_skeleton(resolve_model_file(path)).proto
    except ModelError:
        return False  # ONNX Runtime reports what is wrong with the file
    return any(name in proto for name in _QUANTIZING_OPS)


@functools.cache
def _cpu_saturates() -> bool:
    """Return whether this is an x64 CPU without VNNI, or one whose features are not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return True
    return "vnni" not in flags


def prepare_quantized_weights(proto: onnx.ModelProto) -> None:
    """Give each quantized product of the outermost graph its own int8 weight, with a zero point for each scale, in place.

    A weight that is dequantized for several nodes is dequantized for each. External data is named again, not copied.
    """
    import onnx

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name: tensor for name, tensor in constants.items() if tensor.data_type == onnx.TensorProto.INT8}
    dequantized = {
        node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    for node in dequantized.values():
        scale = constants.get(node.input[1])
        if scale is not None and scale.dims and not (len(node.input) > 2 and node.input[2]):
            zeros = onnx.TensorProto(name=f"{node.output[0]}__zero_point", data_type=onnx.TensorProto.INT8, dims=scale.dims)
            zeros.raw_data = bytes(math.prod(scale.dims))
            weights[zeros.name] = graph.initializer.add()
            weights[zeros.name].CopyFrom(zeros)
            node.input[:] = [node.input[0], node.input[1], zeros.name]
    readers: Counter[str] = Counter()

    def name_for_next_reader(name: str) -> str:
        readers[name] += 1
        return name if readers[name] == 1 else f"{name}__reader{readers[name]}"

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in dequantized and (own := name_for_next_reader(name)) != name:
                copy = onnx.NodeProto()
                copy.CopyFrom(dequantized[name])
                copy.name = copy.output[0] = node.input[index] = own
                nodes.append(copy)
        nodes.append(node)
    for node in nodes:
        for index in _WEIGHT_INPUTS.get(node.op_type, ()):
            name = node.input[index] if index < len(node.input) else ""
            if name in weights and (own := name_for_next_reader(name)) != name:
                tensor = graph.initializer.add()
                tensor.CopyFrom(weights[name])
                tensor.name = node.input[index] = own
    graph.ClearField("node")
    graph.node.extend(nodes)
