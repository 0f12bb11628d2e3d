"""What stands in for the native side of TensorRT's plugins: the registry, and the expressions of a build.

NVIDIA's bindings are real. The registry of plugins and the expressions over dimensions exist within a build only, so they are
made here: an expression is a function of the sizes that dims will have.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

trt = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt

DimSizes = Mapping[str, int]


class FakePluginRegistry:
    """Keeps the creators that plugins register."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


REGISTRY = FakePluginRegistry()


class FakeDimsExprs(list[Any]):
    """Stands for DimsExprs."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class FakeSymExpr:
    """Stands for ISymExpr."""


trt.get_plugin_registry = lambda: REGISTRY
trt.DimsExprs, trt.ISymExpr = FakeDimsExprs, FakeSymExpr
trtp = importlib.import_module("tensorrt.plugin")


class FakeDimExpr(trt.IDimensionExpr):  # type: ignore[misc,name-defined]
    """A dimension, or what comes of dimensions."""

    value: Callable[[DimSizes], int]
    constant_value: int | None

    def is_constant(self) -> bool:
        return self.constant_value is not None

    def get_constant_value(self) -> int:
        assert self.constant_value is not None
        return self.constant_value


def dim_expr(value: Callable[[DimSizes], int], constant_value: int | None = None) -> FakeDimExpr:
    made = FakeDimExpr.__new__(FakeDimExpr)  # it has no constructor: a build hands them out
    made.value, made.constant_value = value, constant_value
    return made


OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.SUB: lambda a, b: a - b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.MAX: max,
    trt.DimensionOperation.MIN: min,
    trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class FakeExprBuilder:
    """Stands for IExprBuilder."""

    def constant(self, number: int) -> FakeDimExpr:
        return dim_expr(lambda _: number, number)

    def operation(self, kind: Any, one: FakeDimExpr, other: FakeDimExpr) -> FakeDimExpr:
        both = (
            None
            if one.constant_value is None or other.constant_value is None
            else OPERATIONS[kind](one.constant_value, other.constant_value)
        )
        return dim_expr(lambda sizes: OPERATIONS[kind](one.value(sizes), other.value(sizes)), both)


class FakeLaunchParams(SimpleNamespace):
    """Stands for the native parameters of a launch."""


class FakeSymExprs(dict[int, Any]):
    """Stands for the native setter of scalar arguments."""

    nbSymExprs = 0


TYPES = {
    "float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16,
    "int8": trt.int8, "int32": trt.int32, "int64": trt.int64, "bool": trt.bool,
}  # fmt: skip


def tensor_desc(element: str, minimum: Sequence[int], optimum: Sequence[int], maximum: Sequence[int]) -> Any:
    """Return the description of a tensor whose dims are within bounds: those whose bounds are one number are static."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims = trt.Dims([lowest if lowest == highest else -1 for lowest, highest in zip(minimum, maximum, strict=True)])
    tensor.min, tensor.opt, tensor.max = trt.Dims(minimum), trt.Dims(optimum), trt.Dims(maximum)
    tensor.desc.type, tensor.desc.format = TYPES[element], trt.TensorFormat.LINEAR
    return tensor


def dtype_name(kind: Any) -> str:
    """Return what TensorRT calls an element type."""
    return str(kind).rpartition(".")[2]
