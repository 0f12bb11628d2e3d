"""Validation and conversion of input tensors: whether the arrays of a caller match the input specs of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ShapeError, did_you_mean
from ryzen_compile.spec.interface import Inputs, TensorSpec

if TYPE_CHECKING:
    import numpy as np


def check_input_names(inputs: Mapping[str, object], specs: Sequence[TensorSpec]) -> None:
    """Raise ShapeError unless `inputs` holds every input in `specs`, except optional ones, and no other name."""
    expected = [spec.name for spec in specs]
    for name in inputs:
        if name not in expected:
            raise ShapeError(f"there is no input `{name}`", hint=did_you_mean(name, expected))
    missing = [str(spec) for spec in specs if spec.name not in inputs and not spec.dtype.startswith("optional")]
    if missing:
        raise ShapeError(f"missing inputs: {'; '.join(missing)}", hint="pass a tensor for every input")


def to_host_arrays(inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray[Any, Any]]:
    """Return `inputs` as host arrays by name, in the order of `specs`. Raises ShapeError if they do not match `specs`."""
    check_input_names(inputs, specs)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for spec in specs:
        if spec.name in inputs:
            arrays[spec.name] = to_host_array(inputs[spec.name], spec)
            check_tensor(arrays[spec.name], spec, is_torch=is_torch_tensor(inputs[spec.name]))
    return arrays


def is_torch_tensor(value: object) -> bool:
    """Return whether `value` is a tensor of torch, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def to_host_array(value: Any, spec: TensorSpec) -> Any:
    """Return `value` as a host array, without a copy if it already is in host memory; sequences remain sequences.

    Tensors of other libraries are imported through DLPack. A list or a number has no element type and takes that of `spec`.
    Arrays with a foreign byte order are converted to the native one, in sequences too. Raises ShapeError if `value` cannot be
    converted.
    """
    import numpy as np

    is_tensor = "(" not in spec.dtype  # `float32`, and not `seq(tensor(float))`
    if isinstance(value, np.ndarray) or not is_tensor:
        return _to_native_byte_order(value)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, spec)
    if hasattr(value, "dtype"):
        return _to_native_byte_order(np.asarray(value))
    try:
        return np.asarray(value, dtype=object if spec.dtype == "string" else spec.dtype)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(f"`{spec.name}` cannot be read as {spec.dtype}: {error}") from error


def _to_native_byte_order(value: Any) -> Any:
    import numpy as np

    if isinstance(value, list):
        return [_to_native_byte_order(item) for item in value]
    if not isinstance(value, np.ndarray) or value.dtype.isnative:
        return value
    return value.astype(value.dtype.newbyteorder("="))


def _from_dlpack(value: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    import numpy as np

    try:
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":
            import ml_dtypes
            import torch

            return np.from_dlpack(value.view(torch.int16), device="cpu").view(ml_dtypes.bfloat16)
        return np.from_dlpack(value, device="cpu")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(
            f"`{spec.name}` cannot be read through DLPack: {error}",
            hint=f"pass {spec.name}.detach()" if getattr(value, "requires_grad", False) else "pass a dense tensor, or an array",
        ) from error


def check_scalars(inputs: Inputs, specs: Sequence[TensorSpec]) -> None:
    """Raise ShapeError if an input that is declared without dimensions has some; backends may take it and broadcast."""
    for spec in specs:
        rank = getattr(inputs.get(spec.name), "ndim", 0)
        if spec.dims == () and rank:
            raise ShapeError(f"`{spec.name}` has {rank} dimensions, expected 0: {spec}")


def check_tensor(array: Any, spec: TensorSpec, *, is_torch: bool = False) -> None:
    """Raise ShapeError unless the array has the element type, the rank and the static sizes of `spec`.

    `is_torch` states whether the user's value is a torch tensor.
    """
    if isinstance(array, (list, tuple)):  # a sequence
        return
    if spec.dtype == "string":
        if array.dtype.kind not in "OUST":
            raise ShapeError(f"`{spec.name}` is {array.dtype.name}, expected strings")
    elif array.dtype.name != spec.dtype:
        raise ShapeError(
            f"`{spec.name}` is {array.dtype.name}, expected {spec.dtype}",
            hint=f"convert it: {spec.name}.to(torch.{spec.dtype})"
            if is_torch
            else f'convert it: {spec.name}.astype("{spec.dtype}")',
        )
    if spec.dims is None:
        return
    if array.ndim != len(spec.dims):
        raise ShapeError(f"`{spec.name}` has {array.ndim} dimensions, expected {len(spec.dims)}: {spec}")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.dims, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise ShapeError(f"`{spec.name}` has size {size} along axis {axis}, expected {dim}: {spec}")
