"""Graphs as by ONNX Runtime GenAI's builder: int4 weights, tied embeddings, caches of window size; and their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from support.decoders import HIDDEN, VOCABULARY, export
from support.ort_session import open_session

Array = np.ndarray[Any, Any]
BLOCK_SIZE, _ZERO_POINT = 32, 8
"""Elements per scale, and the quantized value of 0, which MatMulNBits has without an input of zero points."""
FP32, INT8 = 1, 4
"""Accuracy levels of MatMulNBits: activations in float32, or quantized to int8, which the builder writes for CPUs."""


def genai_graph(architecture: str) -> onnx.ModelProto:
    """Return the graph of the builder with float32 weights.

    It declares no shapes of inner tensors: those of the builder are wrong for its constants, so `load` removes all of them.
    """
    proto = onnx.load(export(architecture, "genai"))
    del proto.graph.value_info[:]
    return proto


def quantize_weights(proto: onnx.ModelProto, accuracy_level: int) -> onnx.ModelProto:
    """Replace every MatMul by weights with a MatMulNBits of 4 bits in place; return a copy with dequantized weights instead."""
    dense = onnx.ModelProto()
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    dequantized: dict[str, Array] = {}
    for node in proto.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        name = node.input[1]
        blocks, scales = _quantize(onnx.numpy_helper.to_array(weights[name]).T)
        rows, inputs = len(blocks), weights[name].dims[0]
        dequantized[name] = ((blocks - np.float32(_ZERO_POINT)) * scales[..., None]).reshape(rows, -1)[:, :inputs].T
        packed = blocks[..., ::2] | blocks[..., 1::2] << 4
        proto.graph.initializer.extend(
            (onnx.numpy_helper.from_array(packed, f"{name}_Q4"), onnx.numpy_helper.from_array(scales, f"{name}_scales"))
        )
        sizes = {"K": inputs, "N": rows, "bits": 4, "block_size": BLOCK_SIZE, "accuracy_level": accuracy_level}
        node.op_type, node.domain = "MatMulNBits", "com.microsoft"
        node.input[1:] = [f"{name}_Q4", f"{name}_scales"]
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sizes.items())
    dense.CopyFrom(proto)
    for node in dense.graph.node:
        if node.op_type == "MatMulNBits":
            node.op_type, node.domain = "MatMul", ""
            node.input[1:] = [node.input[1].removesuffix("_Q4")]
            del node.attribute[:]
    _set_weights(dense, dequantized)
    _remove_unused_weights(proto)
    _remove_unused_weights(dense)
    return dense


def _quantize(rows: Array) -> tuple[Array, Array]:
    """Return 4-bit elements (rows, blocks, BLOCK_SIZE) uint8, and scales (rows, blocks), of a matrix (rows, inputs)."""
    padding = -rows.shape[1] % BLOCK_SIZE
    blocks = np.pad(rows, ((0, 0), (0, padding))).reshape(len(rows), -1, BLOCK_SIZE)
    scales = (np.abs(blocks).max(axis=2) / 7).astype(np.float32)
    return (np.rint(blocks / scales[..., None]) + _ZERO_POINT).astype(np.uint8), scales


def _set_weights(proto: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(arrays[tensor.name]), tensor.name))


def _remove_unused_weights(proto: onnx.ModelProto) -> None:
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def tie_embeddings(proto: onnx.ModelProto) -> None:
    """Make the embeddings the weights of the last layer in place: their transposition, or rows of its quantized weights."""
    index, lookup = next((index, node) for index, node in enumerate(proto.graph.node) if "embed" in node.input)
    if all(tensor.name != "head_Q4" for tensor in proto.graph.initializer):
        tied = [onnx.helper.make_node("Transpose", ["head"], ["embed"], perm=[1, 0])]
    else:
        tied = [
            onnx.helper.make_node("Constant", [], ["flat"], value_ints=[VOCABULARY, HIDDEN // 2]),
            onnx.helper.make_node("Reshape", ["head_Q4", "flat"], ["embed"]),
        ]
        attributes = {"bits": 4, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
        lookup.op_type, lookup.domain = "GatherBlockQuantized", "com.microsoft"
        lookup.input.append("head_scales")
        lookup.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:index], *tied, *nodes[index:]])
    kept = [tensor for tensor in proto.graph.initializer if tensor.name != "embed"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def set_window(proto: onnx.ModelProto, layer: int, window: int) -> None:
    """Give `layer` an attention window, and caches of the length of the window, in place."""
    caches = {f"{name}.{layer}.{kind}" for name in ("past_key_values", "present") for kind in ("key", "value")}
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention" and caches & {*node.input}:
            kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend(kept)
            options = {"local_window_size": window, "sliding_window_cache": 1}
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in options.items())
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in caches:
            dim = value.type.tensor_type.shape.dim[2]
            dim.dim_param = dim.dim_param.replace("sequence", "sliding")


def source_logits(proto: onnx.ModelProto, ids: Array, head_size: int, window: int = 0) -> Array:
    """Return the logits (batch, tokens, vocabulary) of single-token steps of ONNX Runtime over `ids` (batch, tokens).

    Caches of window size hold `window` tokens, all others grow.
    """
    session = open_session(proto)
    names = [entry.name for entry in session.get_outputs()]
    caches = {
        entry.name: np.zeros((len(ids), entry.shape[1], window * ("sliding" in str(entry.shape[2])), head_size), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past")
    }
    logits = []
    for token in range(ids.shape[1]):
        inputs = {"input_ids": ids[:, token : token + 1], "attention_mask": np.ones((len(ids), token + 1), np.int64)}
        outputs = dict(zip(names, session.run(None, {**inputs, **caches}), strict=True))
        logits.append(outputs.pop("logits"))
        caches = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return np.concatenate(logits, axis=1)
