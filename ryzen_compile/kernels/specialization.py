"""What a kernel is compiled for: an op at element types, attributes, dims and one of its tactics."""

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
"""The version of PTX that is written for each, times ten: the oldest that knows it and that LLVM writes (7.8: CUDA 11.8)."""

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
"""The most programs that a launch has along each axis (CUDA C++ programming guide, compute capability 7.5 and up)."""


@dataclass(frozen=True)
class Specialization:
    """An op whose kernel can be compiled."""

    op: Op
    type_bindings: Mapping[str, str]
    """Type variable -> element type."""
    attributes: Mapping[str, int | float]
    dims: Mapping[str, int]
    """Those that are `exact` as they are; of the others the largest that there may be."""
    tactic: int = 0
    """Which of the kernel's tactics, counted from 0."""
    divisible_by_16: tuple[str, ...] = ()
    """The scalars that are multiples of 16 at every launch: rows whose length is one are read 16 bytes at a time."""

    def __post_init__(self) -> None:
        for variable in self.op.type_variables:
            if (given := self.type_bindings.get(variable)) not in self.op.type_constraints[variable]:
                allowed = ", ".join(self.op.type_constraints[variable])
                raise ShapeError(f"{self.op.name}: {variable} is {given}, and must be one of {allowed}")
        object.__setattr__(self, "attributes", self.op.check_attributes(self.attributes))
        self.op.check_dims({**self.dims, **self.attributes})
        if self.op.kernel is not None:
            self._check_launch()

    def _check_launch(self) -> None:
        """Refuse dims whose launch would not fit into what a launch is told: 32-bit integers."""
        sizes = {**self.dims, **self.attributes}
        scalars = dict(zip(self.kernel.scalars, self.scalars(sizes), strict=True))
        grid = dict(zip(("x", "y", "z"), self.grid(sizes), strict=True))
        for name, value in scalars.items():
            if value >= 1 << 31:
                raise ShapeError(f"{self}: `{name}` comes to {value}, which no 32-bit integer holds")
        for axis, value in grid.items():
            if value > _MAX_GRID[axis]:
                raise ShapeError(f"{self}: {value} programs along {axis}, and a launch has at most {_MAX_GRID[axis]}")

    def __str__(self) -> str:
        types = ",".join(self.type_bindings[variable] for variable in self.op.type_variables)
        given = " ".join(f"{name}={value}" for name, value in {**self.dims, **self.attributes}.items())
        return f"{self.op.name}[{types}] {given} tactic {self.tactic}"

    @property
    def kernel(self) -> KernelSpec:
        """The kernel; raises BackendError where the op has none."""
        if self.op.kernel is None:
            raise BackendError(f"{self.op.name} has no kernel: every runtime runs its reference")
        return self.op.kernel

    @cached_property
    def expression_values(self) -> dict[str, Any]:
        """What expressions may speak of."""
        sizes = {f"size_{variable}": numpy_dtype(element).itemsize for variable, element in self.type_bindings.items()}
        return {**self.dims, **self.attributes, **sizes}

    @cached_property
    def constants(self) -> dict[str, int | float]:
        """What is compiled in, by parameter."""
        tactic = {name: value for name, value in self.kernel.tactics[self.tactic].items() if name not in _TRITON_OPTIONS}
        return {name: evaluate(text, self.expression_values | tactic) for name, text in self.kernel.constants.items()} | tactic

    @property
    def options(self) -> dict[str, int]:
        """How Triton compiles it."""
        return {name: value for name, value in self.kernel.tactics[self.tactic].items() if name in _TRITON_OPTIONS}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """The parameters in order, with Triton's name of their types."""
        pointers = [
            {port.name: _POINTER_TYPES[self.op.dtype_of(port, self.type_bindings)] for port in ports}
            for ports in (self.op.inputs, self.op.outputs)
        ]
        scalars = dict.fromkeys(self.kernel.scalars, "i32")
        return {**pointers[0], **scalars, **pointers[1], **dict.fromkeys(self.constants, "constexpr")}

    @property
    def argument_count(self) -> int:
        """How many arguments a launch gives: inputs, scalars, outputs."""
        return len(self.parameters) - len(self.constants)

    def scalars(self, dims: Mapping[str, Any], arithmetic: Arithmetic = NUMERIC) -> list[Any]:
        """Return the values of the scalar arguments for the dims that `Op.bind` returned."""
        return [evaluate(text, dims, arithmetic) for text in self.kernel.scalars.values()]

    def with_divisibility(self, dims: Mapping[str, Any] | None = None) -> Specialization:
        """Return the instance for launches whose scalars are those of `known`, where that is a number; else of its dims."""
        values = zip(self.kernel.scalars, self.scalars({**self.dims, **self.attributes} if dims is None else dims), strict=True)
        return dataclasses.replace(self, divisible_by_16=tuple(name for name, value in values if _is_divisible_by_16(value)))

    def grid(self, dims: Mapping[str, Any], arithmetic: Arithmetic = NUMERIC) -> tuple[Any, Any, Any]:
        """Return how many programs a launch has along each axis."""
        sizes = [evaluate(text, {**dims, **self.constants}, arithmetic) for text in self.kernel.grid]
        x, y, z = [*sizes, 1, 1][:3]
        return x, y, z


def typical_specializations(op: Op) -> Iterator[Specialization]:
    """Yield the op at its typical dims and attributes: every choice of element types, every tactic."""
    attributes = {one.name: one.type_(op.typical_dims[one.name]) for one in op.attributes}
    sizes = {name: int(value) for name, value in op.typical_dims.items() if name not in attributes}
    for choice in product(*(op.type_constraints[variable] for variable in op.type_variables)):
        for tactic in range(len(op.kernel.tactics) if op.kernel else 0):
            yield Specialization(
                op, dict(zip(op.type_variables, choice, strict=True)), attributes, sizes, tactic
            ).with_divisibility()


def _is_divisible_by_16(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0
