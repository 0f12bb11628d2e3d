"""Declaration of the op TokenEnergy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, AttributeParam, TensorParam
from ryzen_plugins import _token_inputs
from ryzen_plugins._declaration import RyzenOp, dims_table
from ryzen_plugins._token_kernels import METRIC, SIZE, pairs_kernel_spec


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return tokens, some of them padding; cosines are either far from the margin or exactly equal to it."""
    size = _token_inputs.token_sizes(random, dims["B"], dims["N"])
    metric = _token_inputs.fill_padding(random, _token_inputs.sign_vectors(random, dims["B"], dims["N"], dims["D"]), size)
    return {"metric": metric, "size": size}


TOKEN_ENERGY = RyzenOp(
    name="TokenEnergy",
    description="measure how redundant each token is: the energy by which PiToMe selects tokens to merge",
    formula="""
        real(t)   = size[t] in [2^-64, 2^64]; every other token is padding, and its values are ignored
        cos(s, t) = s . t / (|s| |t|) in float32; 0 if |s|^2 or |t|^2 is at most 1e-30;
                    -2 if one of them is NaN or not below 1e38
        f(c)      = c if c >= margin, otherwise alpha * (exp(c - margin) - 1)
        energy[t] = the mean of f(cos(t, s)) over the real s other than t, 0 if there is none; 2 for padding
    """,
    inputs=(
        METRIC,
        SIZE,
    ),
    outputs=(TensorParam("energy", "float32", "B N", "redundancy of each token"),),
    attributes=(
        AttributeParam("margin", float, -1, 1, "minimum cosine of two tokens that count as similar"),
        AttributeParam("alpha", float, 0, 100, "weight of tokens below the margin"),
    ),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.token_energy.reference:TokenEnergy",
    dim_limits={"B": (1, 65535), "N": (1, 16384), "D": (1, 4096)},
    tolerance=dict.fromkeys(FLOATS, 2e-5),
    kernel=pairs_kernel_spec(
        "ryzen_plugins.token_energy.kernel:token_energy",
        scalars={"tokens": "N"},
        constants={"MARGIN": "margin", "ALPHA": "alpha"},
        rows=("N", "BLOCK_I"),
        columns="BLOCK_J",
    ),
    bytes_moved="B * N * (D * size_T + 8)",
    flops="2 * B * N * N * D",
    typical_dims={"B": 8, "N": 1024, "D": 64, "margin": 0.45, "alpha": 1.0},
    test_cases=dims_table("B N D margin alpha", (2, 9, 16, 0.5, 1.0), (2, 70, 65, 0.3, 0.5), (1, 1, 1, 0.9, 1.0)),
    make_inputs=_make_inputs,
)
