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

Sizes = Mapping[str, int]


class Registry:
    """Keeps the creators that plugins register."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


REGISTRY = Registry()


class Expressions(list[Any]):
    """Stands for DimsExprs."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Scalar:
    """Stands for ISymExpr."""


trt.get_plugin_registry = lambda: REGISTRY
trt.DimsExprs, trt.ISymExpr = Expressions, Scalar
trtp = importlib.import_module("tensorrt.plugin")


class Expression(trt.IDimensionExpr):  # type: ignore[misc,name-defined]
    """A dimension, or what comes of dimensions."""

    value: Callable[[Sizes], int]
    known: int | None

    def is_constant(self) -> bool:
        return self.known is not None

    def get_constant_value(self) -> int:
        assert self.known is not None
        return self.known


def expression(value: Callable[[Sizes], int], known: int | None = None) -> Expression:
    made = Expression.__new__(Expression)  # it has no constructor: a build hands them out
    made.value, made.known = value, known
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


class ExpressionBuilder:
    """Stands for IExprBuilder."""

    def constant(self, number: int) -> Expression:
        return expression(lambda _: number, number)

    def operation(self, kind: Any, one: Expression, other: Expression) -> Expression:
        both = None if one.known is None or other.known is None else OPERATIONS[kind](one.known, other.known)
        return expression(lambda sizes: OPERATIONS[kind](one.value(sizes), other.value(sizes)), both)


class Launch(SimpleNamespace):
    """Stands for the native parameters of a launch."""


class Scalars(dict[int, Any]):
    """Stands for the native setter of scalar arguments."""

    nbSymExprs = 0


TYPES = {
    "float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16,
    "int8": trt.int8, "int32": trt.int32, "int64": trt.int64, "bool": trt.bool,
}  # fmt: skip


def described(element: str, low: Sequence[int], tuned: Sequence[int], high: Sequence[int]) -> Any:
    """Return the description of a tensor whose dims are within bounds: those whose bounds are one number are static."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims = trt.Dims([lowest if lowest == highest else -1 for lowest, highest in zip(low, high, strict=True)])
    tensor.min, tensor.opt, tensor.max = trt.Dims(low), trt.Dims(tuned), trt.Dims(high)
    tensor.desc.type, tensor.desc.format = TYPES[element], trt.TensorFormat.LINEAR
    return tensor


def named(kind: Any) -> str:
    """Return what TensorRT calls an element type."""
    return str(kind).rpartition(".")[2]
