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
