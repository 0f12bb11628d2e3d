"""Declaration of the op TokenUnmerge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, KernelSpec, Op, TensorParam


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return rows of slots, and a random slot for each token."""
    return {
        "y": np.round(random.normal(size=(dims["B"], dims["M"], dims["D"])) * 8),
        "target": random.integers(0, dims["M"], size=(dims["B"], dims["N"]), dtype=np.int32),
    }


TOKEN_UNMERGE = Op(
    domain="ryzen",
    name="TokenUnmerge",
    version=1,
    description="copy the row of its slot to every token: the inverse of token merging, for heads that need all tokens",
    formula="""
        x[t] = y[target[t]]
        targets are clamped to the range of slots
    """,
    inputs=(
        TensorParam("y", "T", "B M D", "one row per slot"),
        TensorParam("target", "int32", "B N", "the slot of each token"),
    ),
    outputs=(TensorParam("x", "T", "B N D", "one row per token"),),
    type_constraints={"T": (*FLOATS, "int8")},
    reference="ryzen_plugins.token_unmerge.reference:TokenUnmerge",
    dim_limits={"B": (1, 65535), "M": (1, 16384), "N": (1, 16384), "D": (1, 65536)},
    tolerance=dict.fromkeys((*FLOATS, "int8"), 0.0),
    kernel=KernelSpec(
        source="ryzen_plugins.token_unmerge.kernel:token_unmerge",
        scalars={"slots": "M", "tokens": "N"},
        constants={
            "D": "D",
            "TOKENS": "max(2, min(64, TILE // power_of_two(min(D, 1024))))",
            "BLOCK_D": "power_of_two(min(D, 1024))",
        },
        static_dims=frozenset("D"),
        grid=("ceil_div(N, TOKENS)", "B", "ceil_div(D, BLOCK_D)"),
        tactics=({"TILE": 4096, "num_warps": 4}, {"TILE": 8192, "num_warps": 4}, {"TILE": 2048, "num_warps": 4}),
    ),
    bytes_moved="B * (M + N) * D * size_T + 4 * B * N",
    typical_dims={"B": 8, "M": 896, "N": 1024, "D": 1024},
    test_cases=(
        {"B": 3, "M": 5, "N": 9, "D": 8},
        {"B": 2, "M": 60, "N": 90, "D": 520},
        {"B": 1, "M": 2, "N": 3, "D": 1030},
        {"B": 1, "M": 1, "N": 1, "D": 1},
    ),
    make_inputs=_make_inputs,
)
