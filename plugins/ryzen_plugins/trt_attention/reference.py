"""Reference of TRT_Attention in standard ONNX ops.

    bias   = mask, and -inf for the keys n >= kv_lengths[b]
    bias   = -inf for the keys n > s + visible[b] - S           if causal_kind is "lower_right"
    bias   = -inf for the keys n > s                            if causal_kind is "upper_left"
    output = softmax(query key^T + bias) value

visible[b] is kv_lengths[b], or N without lengths. Query head h reads key head h * G // H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME = "ryzen", "TRT_Attention"
OPSET = 24
"""Opset of the function body; a model that contains the function must use the same opset."""

_INPUTS = ("query", "key", "value", "mask", "query_lengths", "kv_lengths")


def function() -> onnx.FunctionProto:
    """Return the reference function. It supports every combination of its optional inputs and any floating-point type."""
    from onnx import helper

    return helper.make_function(
        DOMAIN,
        NAME,
        list(_INPUTS),
        ["output"],
        [*_constant_nodes(), *_mask_bias_nodes(), *_causal_bias_nodes(), *_attention_nodes()],
        [helper.make_opsetid("", OPSET)],
        attribute_protos=[helper.make_attribute("causal_kind", "none")],
    )


def _constant_nodes() -> list[onnx.NodeProto]:
    vectors = {f"at_{number}": [number] for number in range(4)} | {"last": [-1]}
    scalars = {"int_0": 0, "int_1": 1}
    floats = {"float_0": 0.0, "float_masked": float("-inf"), "float_low": -1e4}
    return [
        *(_node("Constant", [], [name], value_ints=items) for name, items in vectors.items()),
        *(_node("Constant", [], [name], value_int=item) for name, item in scalars.items()),
        *(_node("Constant", [], [name], value_float=item) for name, item in floats.items()),
        _node("CastLike", ["float_0", "query"], ["zero"]),
        _node("CastLike", ["float_masked", "query"], ["masked"]),
        _node("CastLike", ["float_low", "query"], ["low"]),
    ]


def _mask_bias_nodes() -> list[onnx.NodeProto]:
    """Return nodes that compute `given` (B, H, S, N): the bias that the optional mask and lengths add to the scores.

    Only ops with optional inputs can read an input that may be absent. Attention is such an op: its scores for zero queries
    and keys are exactly the bias from its mask and lengths.
    """
    return [
        _node("Shape", ["query"], ["query_shape"]),
        _node("Shape", ["key"], ["key_shape"]),
        _node("Slice", ["query_shape", "at_0", "at_3"], ["query_rows"]),
        _node("Slice", ["key_shape", "at_0", "at_3"], ["key_rows"]),
        _node("Concat", ["query_rows", "at_1"], ["query_thin"], axis=0),
        _node("Concat", ["key_rows", "at_1"], ["key_thin"], axis=0),
        _node("Expand", ["zero", "query_thin"], ["no_query"]),
        _node("Expand", ["zero", "key_thin"], ["no_key"]),
        _node(
            "Attention",
            ["no_query", "no_key", "no_key", "mask", "", "", "kv_lengths"],
            ["unused", "", "", "given"],
            scale=1.0,
            qk_matmul_output_mode=2,
        ),
    ]


def _causal_bias_nodes() -> list[onnx.NodeProto]:
    """Return nodes that compute `bias` (B, H, S, N): `given`, with later keys masked if the op is causal.

    The number of visible keys is counted in `given`, because a causal op has lengths or no mask at all. Masked entries are
    -inf according to ONNX, but the lowest finite number on ONNX Runtime.
    """
    import onnx

    kind = _node("Constant", [], ["kind"])
    kind.attribute.append(
        onnx.AttributeProto(name="value_string", ref_attr_name="causal_kind", type=onnx.AttributeProto.STRING)
    )
    return [
        kind,
        _node("RegexFullMatch", ["kind"], ["causal"], pattern="(lower_right|upper_left)"),
        _node("RegexFullMatch", ["kind"], ["from_the_end"], pattern="lower_right"),
        _node("Greater", ["given", "low"], ["seen"]),
        _node("Cast", ["seen"], ["seen_count"], to=onnx.TensorProto.INT64),
        _node("ReduceSum", ["seen_count", "last"], ["visible"], keepdims=1),
        _node("Slice", ["query_shape", "at_2", "at_3"], ["queries"]),
        _node("Slice", ["key_shape", "at_2", "at_3"], ["keys"]),
        _node("Squeeze", ["queries"], ["query_count"]),
        _node("Squeeze", ["keys"], ["key_count"]),
        _node("Range", ["int_0", "query_count", "int_1"], ["query_index"]),
        _node("Range", ["int_0", "key_count", "int_1"], ["key_index"]),
        _node("Unsqueeze", ["query_index", "last"], ["query_column"]),
        _node("Sub", ["visible", "queries"], ["ahead"]),
        _node("Where", ["from_the_end", "ahead", "int_0"], ["before"]),
        _node("Add", ["query_column", "before"], ["newest"]),
        _node("Greater", ["key_index", "newest"], ["later"]),
        _node("And", ["later", "causal"], ["hidden"]),
        _node("Where", ["hidden", "masked", "given"], ["bias"]),
    ]


def _attention_nodes() -> list[onnx.NodeProto]:
    return [_node("Attention", ["query", "key", "value", "bias"], ["output"], scale=1.0)]


def _node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node(op, inputs, outputs, **attributes)
