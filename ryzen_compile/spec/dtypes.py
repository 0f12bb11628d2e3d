"""Element types: from the names that specs carry to numpy's types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type called `name`; `string` becomes numpy's text type. Raises ShapeError for an unknown name.

    The types that numpy lacks (`bfloat16`, `float8_*`, `float4_e2m1fn`, `int4`, `int2`, ...) are those of ml_dtypes, with one
    element a byte or more.
    """
    import ml_dtypes
    import numpy as np

    if name == "string":
        return np.dtype(np.str_)
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ShapeError(f"`{name}` is not an element type", hint="use numpy's names: float32, bfloat16, int64, bool") from None
