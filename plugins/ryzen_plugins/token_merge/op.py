"""Declaration of the op TokenMerge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, TensorParam
from ryzen_plugins import _token_inputs
from ryzen_plugins._declaration import RyzenOp, dims_table
from ryzen_plugins._token_kernels import SIZE, SLOTS, copy_kernel_spec


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return tokens, some of them padding; every slot has at least one token, and some have many."""
    b, n, slots = dims["B"], dims["N"], dims["M"]
    size = _token_inputs.token_sizes(random, b, n)
    target = np.empty((b, n), np.int32)
    for sequence in range(b):
        merged = random.permutation(n)[slots:]
        target[sequence] = np.cumsum(~np.isin(np.arange(n), merged)) - 1
        target[sequence, merged] = np.minimum(random.geometric(0.3, size=merged.size) - 1, slots - 1)
    return {
        "x": _token_inputs.fill_padding(random, random.normal(size=(b, n, dims["D"])), size),
        "size": size,
        "target": target,
        "slots": np.zeros(slots, np.int32),
    }


TOKEN_MERGE = RyzenOp(
    name="TokenMerge",
    description="average the tokens that share a slot, weighted by the number of tokens that each represents",
    formula="""
        real(t)     = size[t] in [2^-64, 2^64]; every other token is padding, and its values are ignored
        size_out[m] = the sum of size[t] over the real t with target[t] = m
        y[m]        = 0 if there is no such t; exactly x[t] if there is one; otherwise
                      the sum of size[t] * x[t] over them, divided by size_out[m], in float32;
                      NaN if one |size[t] * x[t]| is NaN or not below 2^96
        tokens with a target outside of [0, M) are dropped
    """,
    inputs=(
        TensorParam("x", "T", "B N D", "the tokens"),
        SIZE,
        TensorParam("target", "int32", "B N", "the slot of each token"),
        SLOTS,
    ),
    outputs=(
        TensorParam("y", "T", "B M D", "one token per slot"),
        TensorParam("size_out", "float32", "B M", "number of tokens that each token represents; 0 for padding"),
    ),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.token_merge.reference:TokenMerge",
    dim_limits={"B": (1, 65535), "N": (1, 16384), "D": (1, 65536), "M": (1, 16384)},
    tolerance={"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3},
    kernel=copy_kernel_spec(
        "ryzen_plugins.token_merge.kernel:token_merge",
        scalars={"tokens": "N", "slot_count": "M"},
        constants={"GROUPS": "power_of_two(ceil_div(N, 64))"},
        rows=("M", "SLOTS"),
        tactics=((8192, 8), (4096, 4), (4096, 8)),
    ),
    bytes_moved="B * (N + M) * (D * size_T + 4) + 4 * B * N",
    typical_dims={"B": 8, "N": 1024, "D": 1024, "M": 896},
    test_cases=dims_table("B N D M", (3, 9, 8, 6), (2, 130, 520, 70), (1, 3, 1030, 2), (1, 1, 1, 1)),
    make_inputs=_make_inputs,
)
