"""Declaration of the op AcmeAxpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, AttributeParam, KernelSpec, Op, TensorParam


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return random x and y."""
    return {name: random.normal(size=(dims["N"], dims["D"])) for name in "xy"}


AXPY = Op(
    domain="acme",
    name="AcmeAxpy",
    version=1,
    description="factor * x + y",
    formula="z = factor * x + y",
    inputs=(TensorParam("x", "T", "N D"), TensorParam("y", "T", "N D")),
    outputs=(TensorParam("z", "T", "N D"),),
    attributes=(AttributeParam("factor", float, -10, 10, "what x is multiplied by"),),
    type_constraints={"T": FLOATS},
    reference="acme_ops.axpy.reference:AcmeAxpy",
    dim_limits={"D": (1, 4096)},
    tolerance={"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3},
    kernel=KernelSpec(
        source="acme_ops.axpy.kernel:axpy",
        scalars={"count": "N * D"},
        constants={"FACTOR": "factor"},
        grid=("ceil_div(N * D, BLOCK)",),
        tactics=({"BLOCK": 64, "num_warps": 2}, {"BLOCK": 256, "num_warps": 4}),
    ),
    bytes_moved="3 * N * D * size_T",
    typical_dims={"N": 1024, "D": 1024, "factor": 2.0},
    test_cases=({"N": 3, "D": 50, "factor": -1.5}, {"N": 1, "D": 1, "factor": 0.0}),
    make_inputs=_make_inputs,
)
