"""Codecs for tensors: `encode` and `decode` with the custom ops that passes insert into graphs.

    encoded = rc.compression.encode(vectors, codec="int8")
    print(encoded.ratio, encoded.relative_error)
    vectors = rc.compression.decode(encoded)

| codec | op | stored |
|---|---|---|
| `fp8` | VectorQuantizeFp8 | float8 e4m3 and a float32 scale for each vector of the last axis |
| `int8` | VectorQuantizeInt8 | 8-bit integers and a float32 scale for each vector |
| `int4` | VectorQuantizeInt4 | 4-bit codes of the rotated vector and a float32 scale; sizes of 16 to 512, powers of two |
| `token-merge` | TokenMatch, TokenAssign, TokenMerge | the means of the most similar tokens of (batch, tokens, features) |

The references of the ops run on ONNX Runtime, on the CPU. `encode` takes a NumPy array or a torch tensor, and `decode` returns
the same kind and element type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ryzen_compile import registry
from ryzen_compile.backends.input_validation import is_torch_tensor, to_host_array
from ryzen_compile.errors import AccuracyError, ShapeError, UsageError, did_you_mean
from ryzen_compile.ops.equivalence import ReferenceRunner
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Encoded", "decode", "encode"]

MAX_RELATIVE_ERROR = 0.05
"""The bound of the relative error by default."""
_VECTOR_OPS = {"fp8": "Fp8", "int8": "Int8", "int4": "Int4"}
_TOKEN_MERGE = "token-merge"
CODECS = (*_VECTOR_OPS, _TOKEN_MERGE)
_ELEMENT_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """An encoded tensor."""

    codec: str
    tensors: Mapping[str, Array]
    """The arrays that are stored, by the names of the outputs of the ops."""
    shape: tuple[int, ...]
    """The shape of the tensor that was encoded."""
    dtype: str
    """Its element type, by its NumPy name."""
    kind: Literal["numpy", "torch"]
    """The library of the tensor."""
    relative_error: float
    """The Frobenius norm of the difference of the decoded tensor from the original, divided by that of the original."""

    @property
    def nbytes(self) -> int:
        """The bytes that are stored."""
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def ratio(self) -> float:
        """The bytes of the original divided by those that are stored."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize / self.nbytes

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"Encoded({self.codec}, {self.dtype}[{size}], {self.ratio:.2f} times smaller, error {self.relative_error:.2%})"


def encode(x: Any, *, codec: str, merged: int | None = None, max_relative_error: float = MAX_RELATIVE_ERROR) -> Encoded:
    """Encode `x`, a NumPy array or a torch tensor of float32, float16 or bfloat16.

    Args:
        x: Vectors (..., size), or for `token-merge` tokens (batch, tokens, features).
        codec: `fp8`, `int8`, `int4` or `token-merge`.
        merged: The number of tokens that `token-merge` removes from each sequence, at most half of them.
        max_relative_error: The largest accepted relative error.

    Raises:
        UsageError: The codec is unknown, or an argument is out of range.
        ShapeError: The codec does not take the shape or the element type of `x`.
        AccuracyError: The relative error is larger than `max_relative_error`.
    """
    if codec not in CODECS:
        alternatives = f"use one of {', '.join(CODECS)}"
        raise UsageError(f"there is no codec `{codec}`", hint=did_you_mean(codec, [*CODECS]) or alternatives)
    if not (math.isfinite(max_relative_error) and max_relative_error >= 0):
        raise UsageError(f"`max_relative_error` must be at least 0 (got {max_relative_error})")
    if (merged is not None) != (codec == _TOKEN_MERGE):
        needs = "needs" if codec == _TOKEN_MERGE else "does not take"
        raise UsageError(f"the codec `{codec}` {needs} `merged`, the number of tokens to remove")
    array, kind = _to_array(x)
    if codec == _TOKEN_MERGE:
        tensors = _merge(array, merged or 0)
    else:
        tensors = _run(f"VectorQuantize{_VECTOR_OPS[codec]}", array.dtype.name, {"x": array})
    encoded = Encoded(codec=codec, tensors=tensors, shape=array.shape, dtype=array.dtype.name, kind=kind, relative_error=0.0)
    error = _relative_error(array, _decode(encoded))
    if not error <= max_relative_error:
        raise AccuracyError(
            f"`{codec}` has a relative error of {error:.2%} on this tensor, and the bound is {max_relative_error:.2%}",
            hint="use a codec with more bits, or raise max_relative_error",
        )
    return dataclasses.replace(encoded, relative_error=error)


def decode(encoded: Encoded) -> Any:
    """Return the tensor that `encoded` stands for: an array or a torch tensor of the original shape and element type."""
    array = _decode(encoded)
    if encoded.kind == "numpy":
        return array
    import torch

    if encoded.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_array(x: Any) -> tuple[Array, Literal["numpy", "torch"]]:
    """Return a tensor as a NumPy array, and its library."""
    import numpy as np

    kind: Literal["numpy", "torch"] = "torch" if is_torch_tensor(x) else "numpy"
    if kind == "numpy" and not isinstance(x, np.ndarray):
        raise ShapeError(f"a tensor of type {type(x).__name__} cannot be encoded", hint="pass a NumPy array or a torch tensor")
    array = to_host_array(x, TensorSpec(name="x", dtype="float32", dims=None))
    if array.dtype.name not in _ELEMENT_TYPES:
        raise ShapeError(f"a tensor of {array.dtype.name} cannot be encoded", hint=f"convert it to {', '.join(_ELEMENT_TYPES)}")
    if array.size == 0:
        raise ShapeError(f"a tensor without elements, of the shape {list(array.shape)}, cannot be encoded")
    return np.ascontiguousarray(array), kind


def _merge(tokens: Array, merged: int) -> dict[str, Array]:
    """Merge the `merged` tokens at even positions that are most similar to a token at an odd one (Bolya et al. 2022)."""
    import numpy as np

    if tokens.ndim != 3:
        raise ShapeError(f"the codec `{_TOKEN_MERGE}` takes (batch, tokens, features) (got the shape {list(tokens.shape)})")
    batch, count, _ = tokens.shape
    if not 0 <= merged <= count // 2:
        raise UsageError(f"`merged` must be in [0, {count // 2}] for {count} tokens (got {merged})")
    size = np.ones((batch, count), np.float32)
    lists = [np.tile(np.arange(start, count, 2, dtype=np.int32), (batch, 1)) for start in (0, 1)]
    dtype = tokens.dtype.name
    match = _run("TokenMatch", dtype, {"metric": tokens, "size": size, "a": lists[0], "b": lists[1]})
    slots = np.zeros(count - merged, np.int32)
    target = _run("TokenAssign", dtype, {"size": size, "a": lists[0], **match, "slots": slots})["target"]
    means = _run("TokenMerge", dtype, {"x": tokens, "size": size, "target": target, "slots": slots})["y"]
    return {"y": means, "target": target}


def _decode(encoded: Encoded) -> Array:
    import numpy as np

    if encoded.codec == _TOKEN_MERGE:
        return _run("TokenUnmerge", encoded.dtype, encoded.tensors)["x"]
    like = np.zeros((), numpy_dtype(encoded.dtype))
    return _run(f"VectorDequantize{_VECTOR_OPS[encoded.codec]}", encoded.dtype, {**encoded.tensors, "like": like})["x"]


def _run(name: str, dtype: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs of the op called `name`, whose type variable is bound to `dtype`."""
    op = registry.find_op(name)
    op.bind_dims({name: array.shape for name, array in inputs.items()}, {})
    return _reference_runner().run(op, dict.fromkeys(op.type_variables, dtype), {}, inputs)


@functools.cache
def _reference_runner() -> ReferenceRunner:
    return ReferenceRunner()


def _relative_error(original: Array, decoded: Array) -> float:
    import numpy as np

    reference = original.astype(np.float64)
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(decoded.astype(np.float64) - reference)) / norm if norm else 0.0
