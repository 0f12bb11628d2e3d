"""Declaration of the op TokenAssign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import KernelSpec, TensorParam
from ryzen_plugins._declaration import RyzenOp, dims_table
from ryzen_plugins._token_kernels import SLOTS


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return pairs from two disjoint lists, with coarse similarities so that ties occur."""
    shape = (dims["B"], dims["A"])
    a, partner = np.empty(shape, np.int32), np.empty(shape, np.int32)
    for sequence in range(dims["B"]):
        order = random.permutation(dims["N"])
        a[sequence] = order[: dims["A"]]
        partner[sequence] = random.choice(order[dims["A"] :], size=dims["A"])
    return {
        "size": random.integers(0, 5, size=(dims["B"], dims["N"])).astype(np.float64),
        "a": a,
        "partner": partner,
        "similarity": np.round(random.normal(size=shape) * 2) / 2,
        "slots": np.zeros(dims["M"], np.int32),
    }


TOKEN_ASSIGN = RyzenOp(
    name="TokenAssign",
    description="select the most similar pairs of tokens to merge, and number the remaining tokens in sequence order",
    formula="""
        merged tokens = a[i] of the max(0, min(A, N - M)) pairs with the highest similarity[i], ties by ascending i;
                        NaN and -inf count as the lowest finite number
        slot[t]       = the number of tokens before t that are not merged
        target[t]     = slot[partner[i]] if t is a merged token a[i], otherwise slot[t]
        `a` must contain no merged token twice and no partner of one, so that a partner is itself not merged
        indices are clamped to the range of tokens
    """,
    inputs=(
        TensorParam("size", "float32", "B N", "number of tokens that each token represents; only the shape is read"),
        TensorParam("a", "int32", "B A", "indices of the tokens that may be merged"),
        TensorParam("partner", "int32", "B A", "index of the token that each is merged with"),
        TensorParam("similarity", "float32", "B A", "similarity of the two tokens"),
        SLOTS,
    ),
    outputs=(TensorParam("target", "int32", "B N", "the slot of each token, in [0, max(M, N - A))"),),
    type_constraints={},
    reference="ryzen_plugins.token_assign.reference:TokenAssign",
    dim_limits={"B": (1, 65535), "N": (1, 16384), "A": (1, 16384), "M": (1, 16384)},
    constraints=("A <= N",),
    tolerance={"float32": 0.0},
    kernel=KernelSpec(
        source="ryzen_plugins.token_assign.kernel:token_assign",
        scalars={"tokens": "N", "pairs": "A", "merged": "N - M"},
        constants={"BLOCK_N": "power_of_two(N)", "BLOCK_A": "power_of_two(A)"},
        grid=("B",),
        tactics=({"num_warps": 4}, {"num_warps": 8}, {"num_warps": 16}),
    ),
    bytes_moved="B * (12 * A + 4 * N)",
    typical_dims={"B": 8, "N": 1024, "A": 512, "M": 896},
    test_cases=dims_table("B N A M", (3, 9, 5, 7), (2, 70, 33, 37), (2, 2, 1, 2)),
    make_inputs=_make_inputs,
)
