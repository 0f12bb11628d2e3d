"""Declaration of the op TRT_Attention."""

from __future__ import annotations

from ryzen_compile.spec.op import TensorParam
from ryzen_plugins._declaration import RyzenOp

TRT_ATTENTION = RyzenOp(
    name="TRT_Attention",
    description="softmax(Q K^T + mask) V, masked by a tensor or by lengths, optionally causal; scores are not scaled",
    inputs=(
        TensorParam("query", "T", "B H S D"),
        TensorParam("key", "T", "B G N D"),
        TensorParam("value", "T", "B G N D"),
        TensorParam("mask", "M", "B H S N", optional=True),
        TensorParam("query_lengths", "I", "B", optional=True),
        TensorParam("kv_lengths", "I", "B", optional=True),
    ),
    outputs=(TensorParam("output", "T", "B H S D"),),
    type_constraints={
        "T": ("float32", "float16", "bfloat16"),
        "M": ("bool", "float32", "float16", "bfloat16"),
        "I": ("int64",),
    },
    reference="ryzen_plugins.trt_attention.reference:function",
)
