"""Declaration of the op TokenUnmerge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, TensorParam
from ryzen_plugins._declaration import RyzenOp, dims_table
from ryzen_plugins._token_kernels import copy_kernel_spec


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return rows of slots, and a random slot for each token."""
    return {
        "y": np.round(random.normal(size=(dims["B"], dims["M"], dims["D"])) * 8),
        "target": random.integers(0, dims["M"], size=(dims["B"], dims["N"]), dtype=np.int32),
    }


TOKEN_UNMERGE = RyzenOp(
    name="TokenUnmerge",
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
    kernel=copy_kernel_spec(
        "ryzen_plugins.token_unmerge.kernel:token_unmerge",
        scalars={"slots": "M", "tokens": "N"},
        rows=("N", "TOKENS"),
        tactics=((4096, 4), (8192, 4), (2048, 4)),
    ),
    bytes_moved="B * (M + N) * D * size_T + 4 * B * N",
    typical_dims={"B": 8, "M": 896, "N": 1024, "D": 1024},
    test_cases=dims_table("B M N D", (3, 5, 9, 8), (2, 60, 90, 520), (1, 2, 3, 1030), (1, 1, 1, 1)),
    make_inputs=_make_inputs,
)
