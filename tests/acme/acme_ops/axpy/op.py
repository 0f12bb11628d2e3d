"""The declaration of AcmeAxpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, Attribute, Kernel, Op, Port


def _draw(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    return {name: random.normal(size=(dims["N"], dims["D"])) for name in "xy"}


AXPY = Op(
    domain="acme",
    name="AcmeAxpy",
    version=1,
    says="factor * x + y",
    formula="z = factor * x + y",
    inputs=(Port("x", "T", "N D"), Port("y", "T", "N D")),
    outputs=(Port("z", "T", "N D"),),
    attributes=(Attribute("factor", float, -10, 10, "what x is multiplied by"),),
    elements={"T": FLOATS},
    reference="acme_ops.axpy.reference:AcmeAxpy",
    limits={"D": (1, 4096)},
    tolerance={"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3},
    kernel=Kernel(
        source="acme_ops.axpy.kernel:axpy",
        scalars={"count": "N * D"},
        constants={"FACTOR": "factor"},
        grid=("ceil_div(N * D, BLOCK)",),
        tactics=({"BLOCK": 64, "num_warps": 2}, {"BLOCK": 256, "num_warps": 4}),
    ),
    bytes_moved="3 * N * D * size_T",
    typical={"N": 1024, "D": 1024, "factor": 2.0},
    cases=({"N": 3, "D": 50, "factor": -1.5}, {"N": 1, "D": 1, "factor": 0.0}),
    draw=_draw,
)
