"""Declaration of the op TokenMatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, TensorParam
from ryzen_plugins import _token_inputs
from ryzen_plugins._declaration import RyzenOp, dims_table
from ryzen_plugins._token_kernels import METRIC, SIZE, pairs_kernel_spec


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return tokens, some of them padding, with ties between cosines; the lists are disjoint if there are enough tokens."""
    size = _token_inputs.token_sizes(random, dims["B"], dims["N"])
    a, b = _token_inputs.disjoint_lists(random, dims["B"], dims["N"], dims["A"], dims["M"])
    metric = _token_inputs.fill_padding(random, _token_inputs.sign_vectors(random, dims["B"], dims["N"], dims["D"]), size)
    return {"metric": metric, "size": size, "a": a, "b": b}


TOKEN_MATCH = RyzenOp(
    name="TokenMatch",
    description="find the most similar token of list b for each token of list a: the matching step of token merging",
    formula="""
        real(t)    = size[t] in [2^-64, 2^64]; every other token is padding, and its values are ignored
        cos(s, t)  = s . t / (|s| |t|) in float32; 0 if |s|^2 or |t|^2 is at most 1e-30;
                     -2 if one of them is NaN or not below 1e38
        sim(s, t)  = cos(s, t) if both are real; -2 if s is real and t is padding; 2 if s is padding and t is real;
                     3 if both are padding
        partner[i]    = the first b[j] with the highest sim(a[i], b[j])
        similarity[i] = sim(a[i], partner[i])
        indices are clamped to the range of tokens
    """,
    inputs=(
        METRIC,
        SIZE,
        TensorParam("a", "int32", "B A", "indices of the tokens to match"),
        TensorParam("b", "int32", "B M", "indices of the candidate partners"),
    ),
    outputs=(
        TensorParam("partner", "int32", "B A", "the most similar token of `b` for each token of `a`"),
        TensorParam(
            "similarity", "float32", "B A", "their cosine; above 1 for padding in `a`, -2 if a real token has no valid match"
        ),
    ),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.token_match.reference:TokenMatch",
    dim_limits={"B": (1, 65535), "N": (1, 16384), "D": (1, 4096), "A": (1, 16384), "M": (1, 16384)},
    tolerance=dict.fromkeys(FLOATS, 2e-5),
    kernel=pairs_kernel_spec(
        "ryzen_plugins.token_match.kernel:token_match",
        scalars={"tokens": "N", "count_a": "A", "count_b": "M"},
        rows=("A", "BLOCK_A"),
        columns="BLOCK_B",
    ),
    bytes_moved="B * (A + M) * (D * size_T + 8) + 8 * B * A",
    flops="2 * B * A * M * D",
    typical_dims={"B": 8, "N": 1024, "D": 64, "A": 512, "M": 512},
    test_cases=dims_table("B N D A M", (2, 9, 16, 4, 5), (2, 150, 65, 70, 80), (1, 1, 1, 1, 1)),
    make_inputs=_make_inputs,
)
