"""Graphs in which no two nodes share a quantized weight.

With `session.x64quantprecision=1`, ONNX Runtime converts the int8 weights of quantized products to uint8 on CPUs without VNNI,
so that sums of two products do not saturate at 16 bits. It names a converted tensor after its source, and refuses a graph
where two products share a weight or, as is common, a zero point.
"""

from __future__ import annotations

from collections import Counter

import onnx

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


def unshare_quantized_weights(proto: onnx.ModelProto) -> None:
    """Give each quantized product of the outermost graph its own int8 weight and zero point, in place.

    A weight that is dequantized for several nodes is dequantized for each. External data is named again, not copied.
    """
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    dequantized = {
        node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
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
