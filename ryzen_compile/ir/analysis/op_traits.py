"""Traits of standard ONNX ops, as sets of op types, that several analyses and passes read.

A set that serves one analysis only, such as the ops that a matcher traces through, stays in the module of that analysis.
"""

from __future__ import annotations

RANDOM_OPS = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
"""Ops whose outputs are random draws."""
NONDETERMINISTIC_OPS = RANDOM_OPS | {"Dropout"}
"""Ops that may return different results for equal operands: random ops, and Dropout, which is random in training mode."""
COMPARISON_OPS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
"""Ops that compare two tensors elementwise and return bool."""
VIEW_OPS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""Ops that change only the shape of their first input; its elements keep their order."""
LAYOUT_OPS = VIEW_OPS | {"Expand", "Slice", "Transpose"}
"""Ops that move, repeat or drop the elements of their first input, and that add no others."""
CONVERSION_OPS = frozenset({"Cast", "Identity"})
"""Ops that return their input, possibly converted to another element type."""
DATA_MOVEMENT_OPS = LAYOUT_OPS | frozenset(
    """Concat DepthToSpace Gather GatherElements GatherND Identity Pad ReverseSequence SpaceToDepth Split Tile Trilu""".split()
)
"""Ops whose outputs contain elements of their inputs and fill values only, unconverted."""
ACCUMULATING_REDUCE_OPS = frozenset(
    """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare""".split()
)
"""Reductions that add or multiply elements, and so round their partial results."""
REDUCE_OPS = ACCUMULATING_REDUCE_OPS | {"ReduceMax", "ReduceMin"}
"""All reductions over `axes`."""
ATTENTION_OPS = frozenset({"Attention", "TRT_Attention"})
"""Attention of the standard domain, and the attention op of TensorRT, which has the same first four inputs."""
