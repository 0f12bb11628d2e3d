"""Attention decomposed into MatMul and Softmax, in the forms that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

B, H, S, N, D = 2, 4, 5, 7, 32
"""Batch size, heads, queries, keys, head size."""

FLOAT_INPUTS = f"float[B,{H},S,{D}] q, float[B,{H},N,{D}] k, float[B,{H},N,{D}] v"
KEY_LAYOUTS = {
    "swapped": (FLOAT_INPUTS, "kt = Transpose <perm=[0,1,3,2]> (k)"),
    "sequence first": (
        f"float[B,{H},S,{D}] q, float[B,N,{H},{D}] k, float[B,{H},N,{D}] v",
        "kt = Transpose <perm=[0,2,3,1]> (k)",
    ),
    "already transposed": (f"float[B,{H},S,{D}] q, float[B,{H},{D},N] k, float[B,{H},N,{D}] v", "kt = Identity (k)"),
    "flat": (
        FLOAT_INPUTS,
        """ks = Shape (k)  at2 = Constant <value_ints=[2]> ()  at3 = Constant <value_ints=[3]> ()
        at4 = Constant <value_ints=[4]> ()  at0 = Constant <value_ints=[0]> ()  rest = Constant <value_ints=[-1]> ()
        rows = Slice (ks, at2, at3)  width = Slice (ks, at3, at4)  outer = Slice (ks, at0, at2)
        thin = Concat <axis=0> (rest, rows, width)  k3 = Reshape (k, thin)  k3t = Transpose <perm=[0,2,1]> (k3)
        wide = Concat <axis=0> (outer, width, rows)  kt = Reshape (k3t, wide)""",
    ),
    "grouped query": (
        f"float[B,{H},S,{D}] q, float[B,{H // 2},N,{D}] k, float[B,{H // 2},N,{D}] v_few",
        f"""at2 = Constant <value_ints=[2]> ()  five = Constant <value_ints=[1,1,2,1,1]> ()
        four = Constant <value_ints=[0,{H},-1,{D}]> ()
        k1 = Unsqueeze (k, at2)  k2 = Expand (k1, five)  k4 = Reshape (k2, four)  kt = Transpose <perm=[0,1,3,2]> (k4)
        v1 = Unsqueeze (v_few, at2)  v2 = Expand (v1, five)  v = Reshape (v2, four)""",
    ),
    "3-D": (f"float[B,S,{D}] q, float[B,N,{D}] k, float[B,N,{D}] v", "kt = Transpose <perm=[0,2,1]> (k)"),
}
"""Key layouts, as (graph inputs, nodes that compute the transposed keys `kt`)."""

UNSCALED = "s = MatMul (q, kt)"
SCALES = {
    "none": UNSCALED,
    "query": f"c = Constant <value_float={D**-0.5}> ()  q1 = Mul (q, c)  s = MatMul (q1, kt)",
    "keys": f"c = Constant <value_float={D**-0.5}> ()  k_ = Mul (c, kt)  s = MatMul (q, k_)",
    "both": f"c = Constant <value_float={D**-0.25}> ()  q1 = Mul (q, c)  k_ = Mul (kt, c)  s = MatMul (q1, k_)",
    "divided after": f"c = Constant <value_float={D**0.5}> ()  s0 = MatMul (q, kt)  s = Div (s0, c)",
    "multiplied after": f"c = Constant <value_floats=[{D**-0.5}]> ()  s0 = MatMul (q, kt)  s = Mul (s0, c)",
    "dynamic": """w = Shape <start=-1> (q)  zero = Constant <value_int=0> ()  w0 = Gather (w, zero)
        w1 = Cast <to=1> (w0)  c = Sqrt (w1)  s0 = MatMul (q, kt)  s = Div (s0, c)""",
    "soft-capped": f"""c = Constant <value_float={D**-0.5}> ()  s0 = MatMul (q, kt)  s1 = Mul (s0, c)
        cap = Constant <value_float=0.8> ()  s2 = Div (s1, cap)  s3 = Tanh (s2)  s = Mul (s3, cap)""",
    "negative": f"c = Constant <value_float={-(D**-0.5)}> ()  s0 = MatMul (q, kt)  s = Mul (s0, c)",
}
"""Nodes that compute the scores `s` from `q` and `kt`."""

_LOWEST_FLOAT = "zero_ = Constant <value_float=0.0> ()  low = Constant <value_float=-3.4028234e38> ()"
_MINUS_INFINITY = "zero_ = Constant <value_float=0.0> ()  low = Constant <value = float {-inf}> ()"
MASKS = {
    "none": ("", "m = Identity (s)"),
    "added": (", float[B,1,1,N] mask", "m = Add (s, mask)"),
    "added as the left operand": (", float[S,N] mask", "m = Add (mask, s)"),
    "1-D": (", float[N] mask", "m = Add (s, mask)"),
    "Where with the lowest value": (
        ", bool[B,1,S,N] keep",
        f"{_LOWEST_FLOAT}  mask = Where (keep, zero_, low)  m = Add (s, mask)",
    ),
    "Where with minus infinity": (
        ", bool[B,1,S,N] keep",
        f"{_MINUS_INFINITY}  mask = Where (keep, zero_, low)  m = Add (s, mask)",
    ),
    "scores filled": (", bool[B,1,S,N] keep", f"{_LOWEST_FLOAT}  m = Where (keep, s, low)"),
    "scores filled, inverted condition": (
        ", bool[B,1,S,N] keep",
        "low = Constant <value_float=-10000.0> ()  drop = Not (keep)  m = Where (drop, low, s)",
    ),
    "scores filled with the lowest value, then with minus infinity": (
        ", bool[B,1,S,N] keep, bool[N] not_padding",
        f"{_LOWEST_FLOAT}  m0 = Where (keep, s, low)  infinite = Constant <value = float {{-inf}}> ()  "
        "m = Where (not_padding, m0, infinite)",
    ),
    "two masks": (
        ", bool[B,1,S,N] keep, float[B,1,1,N] mask",
        f"{_LOWEST_FLOAT}  m0 = Where (keep, s, low)  m = Add (m0, mask)",
    ),
}
"""Nodes that compute the masked scores `m` from `s`, as (additional graph inputs, nodes)."""

SOFTMAXES = {
    "plain": "p = Softmax <axis=-1> (m)",
    "NaN guard": """p0 = Softmax <axis=-1> (m)  bad = IsNaN (p0)  nothing = Constant <value_float=0.0> ()
        p = Where (bad, nothing, p0)""",
    "cast": "m1 = Cast <to=1> (m)  p0 = Softmax <axis=-1> (m1)  p = Cast <to=1> (p0)",
}
"""Nodes that compute the attention weights `p` from `m`."""


def decomposed_attention(
    *, key: str = "swapped", scale: str = "divided after", mask: str = "none", softmax: str = "plain", opset: int = 18
) -> onnx.ModelProto:
    """Return a decomposed attention with dynamic batch and lengths; its last MatMul is the node `attend`."""
    inputs, key_nodes = KEY_LAYOUTS[key]
    mask_inputs, mask_nodes = MASKS[mask]
    output = f"float[B,S,{D}] y" if key == "3-D" else f"float[B,{H},S,{D}] y"
    if key == "3-D":
        mask_inputs = mask_inputs.replace("[B,1,", "[B,")
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        attention ({inputs}{mask_inputs}) => ({output}) {{
            {key_nodes}  {SCALES[scale]}  {mask_nodes}  {SOFTMAXES[softmax]}  [attend] y = MatMul (p, v)
        }}""")


def random_inputs(model: onnx.ModelProto, *, seed: int = 0, mask_row: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """Return random inputs for `model`; with `mask_row`, all keys of the third query of the first sample are masked."""
    rng = np.random.default_rng(seed)
    dynamic_sizes = {"B": B, "S": S, "N": N}
    values: dict[str, np.ndarray[Any, Any]] = {}
    for graph_input in model.graph.input:
        tensor = graph_input.type.tensor_type
        shape = [dim.dim_value or dynamic_sizes[dim.dim_param] for dim in tensor.shape.dim]
        if graph_input.name == "keep":
            keep = rng.random(shape) < 0.6
            keep[..., 0] = True
            if mask_row:
                keep[0, ..., 2, :] = False
            values[graph_input.name] = keep
        elif graph_input.name == "mask":
            values[graph_input.name] = np.where(rng.random(shape) < 0.7, rng.normal(size=shape), -1e9).astype(np.float32)
        else:
            values[graph_input.name] = rng.normal(size=shape).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return values
