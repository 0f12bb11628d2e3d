"""Drives the TensorRT plugins of custom ops as a builder would, through NVIDIA's own bindings, and prints what it answered.

On its standard input: JSON, a list of orders. An order names the `op`, its `elements`, and the `sizes` of its dims as
(smallest, tuned, largest), where `...` is `R0 R1`; a dim of one size is static. With `shared`, kernels are not compiled, and
a stand-in needs so many bytes of shared memory. The string "register_ops" instead of a list has the backend register all ops
for sm90.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from plugin_stubs import REGISTRY, TYPES, ExpressionBuilder, Launch, Scalars, described, expression, named, trt, trtp

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.nvinfer import plugins
from ryzen_compile.backends.tensorrt import backend
from ryzen_compile.errors import RyzenError
from ryzen_compile.kernels import Instance, compile_all
from ryzen_compile.kernels.aot import Compiled
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dim_expr import evaluate
from ryzen_compile.spec.op import Op, Port

SM = 90


class Kernels:
    """Compiles, or pretends to; knows what it was asked for last."""

    def __init__(self, shared: int | None) -> None:
        self.shared = shared
        self.asked: Instance

    def compile_all(self, instances: list[Instance], sms: list[int], *, store: Store) -> dict[tuple[int, int], Compiled]:
        (self.asked,) = instances
        if self.shared is None:
            return compile_all(instances, sms, store=store)
        rest = {"cubin": b"", "registers": 0, "spilled_bytes": 0, "hidden": 0, "triton": ""}
        return {(0, SM): Compiled(name="k", sm=SM, ptx="", shared_bytes=self.shared, threads=128, **rest)}


@functools.cache
def creator(name: str) -> Any:
    op = find_op(name)
    plugins.register(op, trt, trtp, sm=SM, store=Store())
    return REGISTRY.get_creator(op.name, "1", op.domain)


def plugin(op: Op) -> Any:
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = [
        trt.PluginField(one.name, np.array([op.typical[one.name]], kinds[one.kind][0]), kinds[one.kind][1])
        for one in op.attributes
    ]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator(op.name).create_plugin(op.name, op.domain, fields, trt.TensorRTPhase.BUILD, request)


def tokens(port: Port) -> list[str]:
    return port.dims.replace("...", "R0 R1").split()


def answer(op: Op, elements: Mapping[str, str], sizes: Mapping[str, tuple[int, int, int]], shared: int | None) -> Any:
    """Take the steps of a builder, in its order."""
    kernels = Kernels(shared)
    plugins.compile_all = kernels.compile_all  # type: ignore[assignment]
    attributes = {one.name: one.kind(op.typical[one.name]) for one in op.attributes}
    corners = [{**{name: size[corner] for name, size in sizes.items()}, **attributes} for corner in range(3)]
    fixed = {name: size[0] for name, size in sizes.items() if size[0] == size[2]}
    ports = (*op.inputs, *op.outputs)
    everything = [
        described(op.element_of(port, elements), *([evaluate(one, corner) for one in tokens(port)] for corner in corners))
        for port in ports
    ]
    count = len(op.inputs)
    inputs = [
        [expression(lambda at, token=token: evaluate(token, at), fixed.get(token)) for token in tokens(port)]  # type: ignore[misc]
        for port in op.inputs
    ]
    made = plugin(op)
    kinds = made.get_output_data_types([TYPES[op.element_of(port, elements)] for port in op.inputs], [*map(len, inputs)])
    shapes = made.get_output_shapes(inputs, [], ExpressionBuilder())
    combination = made.get_supported_format_combinations(everything, count)
    made.configure_plugin(everything[:count], everything[count:])
    return {
        "types": [named(kind) for kind in kinds],
        "shapes": [[[size.value(at) for size in shape] for shape in shapes] for at in corners],
        "over": [made.get_aliased_input(i) for i in range(len(op.outputs))],
        "combination": [named(one.type) for one in combination],
        "tactics": [
            launched(made, tactic, inputs, everything, corners, kernels) for tactic in sorted(made.get_valid_tactics())
        ],
    }


def launched(made: Any, tactic: int, inputs: list[Any], everything: list[Any], corners: list[Any], kernels: Kernels) -> Any:
    """Return the kernel of a tactic, and how it is launched at each corner of the profile."""
    launch, scalars, count = Launch(), Scalars(), len(inputs)
    made.set_tactic(tactic)
    made.get_launch_params(inputs, everything, count, launch, scalars, ExpressionBuilder())
    descriptions = [tensor.desc for tensor in everything]
    kernel, ptx = made.get_kernel(descriptions[:count], descriptions[count:])
    return {
        "kernel": kernel,
        "ptx": ptx.decode(),
        "constants": kernels.asked.constants,
        "multiples": kernels.asked.multiples,
        "launches": [{key: value.expr.value(at) for key, value in vars(launch).items()} for at in corners],
        "scalars": [[scalars[i].expr.value(at) for i in range(scalars.nbSymExprs)] for at in corners],
    }


def register_ops() -> list[str]:
    """Return what the backend registers for a GPU of sm90."""
    backend.device_sm = lambda: SM  # type: ignore[assignment]
    builder = object.__new__(backend.TensorRTBuilder)
    builder.trt = trt
    builder.register_ops()
    return [f"{namespace}::{name}" for name, namespace in REGISTRY.creators]


def refused(order: Mapping[str, Any]) -> Any:
    """Return the answer to an order, or the class and the words of its refusal."""
    try:
        return answer(find_op(order["op"]), order["elements"], order["sizes"], order["shared"])
    except RyzenError as error:
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    orders = json.load(sys.stdin)
    told = register_ops() if orders == "register_ops" else [refused(order) for order in orders]
    sys.stdout.write("\n" + json.dumps(told))
