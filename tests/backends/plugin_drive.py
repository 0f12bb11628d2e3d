"""Drives a custom op's TensorRT plugin as a builder would, through NVIDIA's own bindings, and prints what it answered.

Arguments: the op's ONNX name, its element types as JSON, the compute capability, the dims that are fixed as JSON.
What is native is replaced: the registry of plugins, and the expressions over dimensions that exist within a build only.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ryzen_compile.cache.store import Store
from ryzen_compile.registry import find_op


class Registry:
    """Keeps the creators that plugins register."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


class Sizes(list[Any]):
    """Stands for DimsExprs."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Scalar:
    """Stands for ISymExpr."""


def main(name: str, elements: dict[str, str], sm: int, fixed: dict[str, int]) -> dict[str, Any]:
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.DimsExprs, trt.ISymExpr = Sizes, Scalar
    trtp = importlib.import_module("tensorrt.plugin")
    # The expressions of a build, as functions of the sizes that dimensions will have.
    from ryzen_compile.backends import _plugins

    class Expression(trt.IDimensionExpr):  # type: ignore[misc,name-defined]
        value: Callable[[Mapping[str, int]], int]
        known: int | None

        def is_constant(self) -> bool:
            return self.known is not None

        def get_constant_value(self) -> int:
            assert self.known is not None
            return self.known

    def expression(value: Callable[[Mapping[str, int]], int], known: int | None = None) -> Expression:
        made = Expression.__new__(Expression)  # it has no constructor: a build hands them out
        made.value, made.known = value, known
        return made

    operations = {
        trt.DimensionOperation.SUM: lambda a, b: a + b,
        trt.DimensionOperation.SUB: lambda a, b: a - b,
        trt.DimensionOperation.PROD: lambda a, b: a * b,
        trt.DimensionOperation.MAX: max,
        trt.DimensionOperation.MIN: min,
        trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
        trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    }

    class Builder:
        def constant(self, number: int) -> Expression:
            return expression(lambda _: number, number)

        def operation(self, kind: Any, one: Expression, other: Expression) -> Expression:
            both = None if one.known is None or other.known is None else operations[kind](one.known, other.known)
            return expression(lambda sizes: operations[kind](one.value(sizes), other.value(sizes)), both)

    op = find_op(name)
    sizes = {dim: int(value) for dim, value in op.typical.items()}
    sizes |= {"R0": sizes.get("ROWS", 1), "R1": 1}
    _plugins.register(op, trt, trtp, sm=sm, store=Store())
    creator = registry.get_creator(op.name, "1", op.domain)
    import numpy as np

    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = [
        trt.PluginField(one.name, np.array([op.typical[one.name]], kinds[one.kind][0]), kinds[one.kind][1])
        for one in op.attributes
    ]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(op.name, op.domain, fields, trt.TensorRTPhase.BUILD, request)

    def described(port: Any) -> Any:
        tensor = trt.DynamicPluginTensorDesc()
        tokens = port.dims.replace("...", "R0 R1").split()
        largest = [sizes[token] if token in sizes else _plugins.dims.evaluate(token, sizes) for token in tokens]
        tensor.desc.dims = trt.Dims([fixed.get(token, -1) for token in tokens])
        tensor.min, tensor.opt, tensor.max = trt.Dims([1] * len(tokens)), trt.Dims(largest), trt.Dims(largest)
        tensor.desc.type = types[op.element_of(port, elements)]
        tensor.desc.format = trt.TensorFormat.LINEAR
        return tensor

    types = {
        "float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16,
        "int8": trt.int8, "int32": trt.int32, "int64": trt.int64, "bool": trt.bool,
    }  # fmt: skip

    def dimension(token: str) -> Expression:
        return expression(lambda known: known[token], fixed.get(token))

    inputs = [[dimension(token) for token in port.dims.replace("...", "R0 R1").split()] for port in op.inputs]
    given = [types[op.element_of(port, elements)] for port in op.inputs]
    output_types = plugin.get_output_data_types(given, [len(one) for one in inputs])
    shapes = plugin.get_output_shapes(inputs, [], Builder())
    everything = [described(port) for port in (*op.inputs, *op.outputs)]
    combinations = plugin.get_supported_format_combinations(everything, len(op.inputs))
    plugin.configure_plugin(everything[: len(op.inputs)], everything[len(op.inputs) :])
    tactics = sorted(plugin.get_valid_tactics())
    found = []
    for tactic in tactics:
        launch, scalars = trt_launch(), Scalars()
        plugin.set_tactic(tactic)
        plugin.get_launch_params(inputs, everything, len(op.inputs), launch, scalars, Builder())
        descs = [tensor.desc for tensor in everything]
        kernel, ptx = plugin.get_kernel(descs[: len(op.inputs)], descs[len(op.inputs) :])
        found.append(
            {
                "kernel": kernel,
                "ptx": ptx.decode(),
                "launch": {key: value.expr.value(sizes) for key, value in vars(launch).items()},
                "scalars": [scalars.expressions[i].expr.value(sizes) for i in range(scalars.nbSymExprs)],
            }
        )
    return {
        "types": [str(kind).rpartition(".")[2] for kind in output_types],
        "shapes": [[size.value(sizes) for size in shape] for shape in shapes],
        "over": [plugin.get_aliased_input(i) for i in range(len(op.outputs))],
        "combination": [str(desc.type).rpartition(".")[2] for desc in combinations],
        "tactics": found,
    }


def trt_launch() -> Any:
    class Launch:
        """Stands for the native parameters of a launch."""

    return Launch()


class Scalars:
    """Stands for the native setter of scalar arguments."""

    nbSymExprs = 0

    def __init__(self) -> None:
        self.expressions: dict[int, Any] = {}

    def __setitem__(self, place: int, expression: Any) -> None:
        self.expressions[place] = expression


if __name__ == "__main__":
    name, elements, sm, fixed = sys.argv[1:]
    answer = main(name, json.loads(elements), int(sm), json.loads(fixed))
    sys.stdout.write("\n" + json.dumps(answer))
