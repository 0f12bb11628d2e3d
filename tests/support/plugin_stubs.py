"""Fakes of the native side of TensorRT's plugins: the plugin registry and the dimension expressions of a build.

NVIDIA's Python bindings are used as they are. The plugin registry and dimension expressions exist only within a native build,
so this module fakes them: an expression is a function of the sizes of the dims.
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
    """Fake of the plugin registry that stores the registered creators."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


REGISTRY = FakePluginRegistry()


class FakeDimsExprs(list[Any]):
    """Fake of DimsExprs."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class FakeSymExpr:
    """Fake of ISymExpr."""


trt.get_plugin_registry = lambda: REGISTRY
trt.DimsExprs, trt.ISymExpr = FakeDimsExprs, FakeSymExpr
trtp = importlib.import_module("tensorrt.plugin")


class FakeDimExpr(trt.IDimensionExpr):  # type: ignore[misc,name-defined]
    """A dim, or an expression over dims."""

    value: Callable[[DimSizes], int]
    constant_value: int | None

    def is_constant(self) -> bool:
        return self.constant_value is not None

    def get_constant_value(self) -> int:
        assert self.constant_value is not None
        return self.constant_value


def dim_expr(value: Callable[[DimSizes], int], constant_value: int | None = None) -> FakeDimExpr:
    expression = FakeDimExpr.__new__(FakeDimExpr)  # the class has no constructor; instances come from a build
    expression.value, expression.constant_value = value, constant_value
    return expression


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
    """Fake of IExprBuilder."""

    def constant(self, number: int) -> FakeDimExpr:
        return dim_expr(lambda _: number, number)

    def operation(self, operation: Any, a: FakeDimExpr, b: FakeDimExpr) -> FakeDimExpr:
        constant_value = (
            None
            if a.constant_value is None or b.constant_value is None
            else OPERATIONS[operation](a.constant_value, b.constant_value)
        )
        return dim_expr(lambda sizes: OPERATIONS[operation](a.value(sizes), b.value(sizes)), constant_value)


class FakeLaunchParams(SimpleNamespace):
    """Fake of the native launch parameters."""


class FakeSymExprs(dict[int, Any]):
    """Fake of the native list of scalar kernel arguments."""

    nbSymExprs = 0


TYPES = {
    "float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16,
    "int8": trt.int8, "int32": trt.int32, "int64": trt.int64, "bool": trt.bool,
}  # fmt: skip


def tensor_desc(dtype: str, minimum: Sequence[int], optimum: Sequence[int], maximum: Sequence[int]) -> Any:
    """Return a tensor description with dim ranges; a dim whose minimum equals its maximum is static."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims = trt.Dims([low if low == high else -1 for low, high in zip(minimum, maximum, strict=True)])
    tensor.min, tensor.opt, tensor.max = trt.Dims(minimum), trt.Dims(optimum), trt.Dims(maximum)
    tensor.desc.type, tensor.desc.format = TYPES[dtype], trt.TensorFormat.LINEAR
    return tensor


def dtype_name(dtype: Any) -> str:
    """Return TensorRT's name of an element type."""
    return str(dtype).rpartition(".")[2]
