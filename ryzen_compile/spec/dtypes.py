"""Element types: the precisions in which models compute, and the conversion of type names to numpy dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ryzen_compile.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np

HalfPrecision = Literal["fp16", "bf16"]
Precision = Literal["fp32", HalfPrecision]
"""The floating-point types in which a model computes, by the names of the command line."""

UNIT_ROUNDOFF: dict[Precision, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of rounding a normal number to the type."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype called `name`; `string` maps to numpy's text type. Raises ShapeError for an unknown name.

    Types that numpy lacks (`bfloat16`, `float8_*`, `float4_e2m1fn`, `int4`, `int2`, ...) are those of ml_dtypes, unpacked:
    each element takes at least one byte.
    """
    import ml_dtypes
    import numpy as np

    if name == "string":
        return np.dtype(np.str_)
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        if "(" in name:
            raise ShapeError(
                f"`{name}` is not the type of a tensor, and only tensors are supported as inputs",
                hint="export the model with one tensor for each element",
            ) from None
        raise ShapeError(f"`{name}` is not an element type", hint="use numpy's names: float32, bfloat16, int64, bool") from None
