"""An op that is only declared: y (N) from x (N) of a type variable T; it has no reference."""

from __future__ import annotations

from collections.abc import Mapping

from ryzen_compile.spec.op import KernelSpec, Op, TensorParam


def declared_op(
    *, tolerance: Mapping[str, float], more_outputs: tuple[TensorParam, ...] = (), kernel: KernelSpec | None = None
) -> Op:
    """Return the op; `tolerance` gives the element types of T and their tolerances."""
    return Op(
        domain="tests",
        name="Declared",
        version=1,
        description="an op without a reference",
        inputs=(TensorParam("x", "T", "N"),),
        outputs=(TensorParam("y", "T", "N"), *more_outputs),
        type_constraints={"T": tuple(tolerance)},
        reference="nowhere:nothing",
        tolerance=tolerance,
        kernel=kernel,
    )
