"""The declaration of TRT_Attention."""

from __future__ import annotations

from ryzen_compile.spec.op import Op, Port

TRT_ATTENTION = Op(
    domain="ryzen",
    name="TRT_Attention",
    version=1,
    says="softmax(Q K^T + mask) V, masked by a tensor or by lengths, optionally causal; scores are not scaled",
    inputs=(
        Port("query", "T", "B H S D"),
        Port("key", "T", "B G N D"),
        Port("value", "T", "B G N D"),
        Port("mask", "M", "B H S N", optional=True),
        Port("query_lengths", "I", "B", optional=True),
        Port("kv_lengths", "I", "B", optional=True),
    ),
    outputs=(Port("output", "T", "B H S D"),),
    elements={
        "T": ("float32", "float16", "bfloat16"),
        "M": ("bool", "float32", "float16", "bfloat16"),
        "I": ("int64",),
    },
    reference="ryzen_plugins.trt_attention.reference:function",
    native=frozenset({"tensorrt", "tensorrt-rtx"}),
)
