"""Kernel specializations: the element types, attributes, dims and tactic that a kernel is compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.spec.dim_expr import NUMERIC, Arithmetic, evaluate
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import KernelSpec, Op

SMS = (75, 80, 86, 89, 90, 100, 120)
"""The compute capabilities that kernels are compiled for."""

PTX_VERSIONS = {75: 78, 80: 78, 86: 78, 89: 78, 90: 80, 100: 86, 120: 87}
"""Compute capability -> PTX version times ten: the oldest version that supports it and that LLVM emits (7.8: CUDA 11.8)."""

_POINTER_TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int8": "*i8",
    "int32": "*i32",
    "int64": "*i64",
    "bool": "*i1",
}
_TRITON_OPTIONS = ("num_warps", "num_stages")
_MAX_GRID = {"x": (1 << 31) - 1, "y": 65535, "z": 65535}
"""Maximum grid size along each axis (CUDA C++ programming guide, compute capability 7.5 and higher)."""


@dataclass(frozen=True)
class Specialization:
    """An op with everything that its kernel is compiled for.

    Raises ShapeError for unsupported element types or dims, and for scalars or grids that exceed a launch's limits; UsageError
    for invalid attributes.
    """

    op: Op
    type_bindings: Mapping[str, str]
    """Type variable -> element type."""
    attributes: Mapping[str, int | float]
    dims: Mapping[str, int]
    """The exact sizes of the kernel's static dims, and the maximum sizes of all other dims."""
    tactic: int = 0
    """Index of the tactic, from 0."""
    divisible_by_16: tuple[str, ...] = ()
    """The scalars that are multiples of 16 at every launch; Triton then vectorizes accesses to rows of that length."""

    def __post_init__(self) -> None:
        for variable in self.op.type_variables:
            if (dtype := self.type_bindings.get(variable)) not in self.op.type_constraints[variable]:
                allowed = ", ".join(self.op.type_constraints[variable])
                raise ShapeError(f"{self.op.name}: {variable} is {dtype}, but must be one of {allowed}")
        object.__setattr__(self, "attributes", self.op.check_attributes(self.attributes))
        self.op.check_dims({**self.dims, **self.attributes})
        if self.op.kernel is not None:
            self._check_launch()

    def _check_launch(self) -> None:
        """Raise ShapeError if a scalar exceeds 32 bits or the grid exceeds the limits of a launch."""
        sizes = {**self.dims, **self.attributes}
        scalars = dict(zip(self.kernel.scalars, self.scalars(sizes), strict=True))
        grid = dict(zip(("x", "y", "z"), self.grid(sizes), strict=True))
        for name, value in scalars.items():
            if value >= 1 << 31:
                raise ShapeError(f"{self}: `{name}` is {value}, which exceeds a 32-bit integer")
        for axis, value in grid.items():
            if value > _MAX_GRID[axis]:
                raise ShapeError(f"{self}: {value} programs along {axis} exceed the maximum of {_MAX_GRID[axis]}")

    def __str__(self) -> str:
        types = ",".join(self.type_bindings[variable] for variable in self.op.type_variables)
        values = " ".join(f"{name}={value}" for name, value in {**self.dims, **self.attributes}.items())
        return f"{self.op.name}[{types}] {values} tactic {self.tactic}"

    @property
    def kernel(self) -> KernelSpec:
        """The op's kernel. Raises BackendError if the op has none."""
        if self.op.kernel is None:
            raise BackendError(f"{self.op.name} has no kernel: every runtime runs its reference")
        return self.op.kernel

    @cached_property
    def expression_values(self) -> dict[str, Any]:
        """The values of the names in expressions: dims, attributes and element sizes."""
        sizes = {f"size_{variable}": numpy_dtype(element).itemsize for variable, element in self.type_bindings.items()}
        return {**self.dims, **self.attributes, **sizes}

    @cached_property
    def constants(self) -> dict[str, int | float]:
        """The compile-time constants, by kernel parameter."""
        tactic = {name: value for name, value in self.kernel.tactics[self.tactic].items() if name not in _TRITON_OPTIONS}
        return {name: evaluate(text, self.expression_values | tactic) for name, text in self.kernel.constants.items()} | tactic

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options of the tactic: `num_warps` and `num_stages`."""
        return {name: value for name, value in self.kernel.tactics[self.tactic].items() if name in _TRITON_OPTIONS}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """The kernel parameters in order, with Triton's names of their types."""
        pointers = [
            {param.name: _POINTER_TYPES[self.op.dtype_of(param, self.type_bindings)] for param in params}
            for params in (self.op.inputs, self.op.outputs)
        ]
        scalars = dict.fromkeys(self.kernel.scalars, "i32")
        return {**pointers[0], **scalars, **pointers[1], **dict.fromkeys(self.constants, "constexpr")}

    @property
    def argument_count(self) -> int:
        """Number of launch arguments: inputs, scalars and outputs."""
        return len(self.parameters) - len(self.constants)

    def scalars(self, dims: Mapping[str, Any], arithmetic: Arithmetic = NUMERIC) -> list[Any]:
        """Return the values of the scalar arguments for the dims that `Op.bind_dims` returned."""
        return [evaluate(text, dims, arithmetic) for text in self.kernel.scalars.values()]

    def with_divisibility(self, dims: Mapping[str, Any] | None = None) -> Specialization:
        """Return the specialization for launches with the scalars of `dims`, setting `divisible_by_16` accordingly.

        `dims` defaults to the dims of the specialization. Scalars that are symbols are assumed not to be multiples of 16.
        """
        values = zip(self.kernel.scalars, self.scalars({**self.dims, **self.attributes} if dims is None else dims), strict=True)
        return dataclasses.replace(self, divisible_by_16=tuple(name for name, value in values if _is_divisible_by_16(value)))

    def grid(self, dims: Mapping[str, Any], arithmetic: Arithmetic = NUMERIC) -> tuple[Any, Any, Any]:
        """Return the number of programs of a launch along each of the three axes."""
        sizes = [evaluate(text, {**dims, **self.constants}, arithmetic) for text in self.kernel.grid]
        x, y, z = [*sizes, 1, 1][:3]
        return x, y, z


def typical_specializations(op: Op) -> Iterator[Specialization]:
    """Yield the specializations for the op's typical dims and attributes: all element types, all tactics."""
    attributes = {attribute.name: attribute.type_(op.typical_dims[attribute.name]) for attribute in op.attributes}
    sizes = {name: int(value) for name, value in op.typical_dims.items() if name not in attributes}
    for dtypes in product(*(op.type_constraints[variable] for variable in op.type_variables)):
        for tactic in range(len(op.kernel.tactics) if op.kernel else 0):
            yield Specialization(
                op, dict(zip(op.type_variables, dtypes, strict=True)), attributes, sizes, tactic
            ).with_divisibility()


def _is_divisible_by_16(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0
