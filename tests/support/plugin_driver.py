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
from plugin_stubs import (
    REGISTRY,
    TYPES,
    FakeExprBuilder,
    FakeLaunchParams,
    FakeSymExprs,
    dim_expr,
    dtype_name,
    tensor_desc,
    trt,
    trtp,
)

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.nvinfer import plugins
from ryzen_compile.backends.tensorrt import backend
from ryzen_compile.errors import RyzenError
from ryzen_compile.kernels import Specialization, compile_all
from ryzen_compile.kernels.aot import CompiledKernel
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dim_expr import evaluate
from ryzen_compile.spec.op import Op, TensorParam

SM = 90


class FakeKernelCompiler:
    """Compiles, or pretends to; knows what it was asked for last."""

    def __init__(self, shared_bytes: int | None) -> None:
        self.shared_bytes = shared_bytes
        self.last_specialization: Specialization

    def compile_all(
        self, specializations: list[Specialization], sms: list[int], *, store: Store
    ) -> dict[tuple[int, int], CompiledKernel]:
        (self.last_specialization,) = specializations
        if self.shared_bytes is None:
            return compile_all(specializations, sms, store=store)
        rest = {"cubin": b"", "registers": 0, "spilled_bytes": 0, "hidden": 0, "triton": ""}
        return {(0, SM): CompiledKernel(name="k", sm=SM, ptx="", shared_bytes=self.shared_bytes, threads=128, **rest)}


@functools.cache
def plugin_creator(name: str) -> Any:
    op = find_op(name)
    plugins.register_plugin(op, trt, trtp, sm=SM, store=Store())
    return REGISTRY.get_creator(op.name, "1", op.domain)


def create_plugin(op: Op) -> Any:
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = [
        trt.PluginField(one.name, np.array([op.typical_dims[one.name]], kinds[one.type_][0]), kinds[one.type_][1])
        for one in op.attributes
    ]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return plugin_creator(op.name).create_plugin(op.name, op.domain, fields, trt.TensorRTPhase.BUILD, request)


def dim_tokens(param: TensorParam) -> list[str]:
    return param.dims.replace("...", "R0 R1").split()


def drive_builder(
    op: Op, type_bindings: Mapping[str, str], sizes: Mapping[str, tuple[int, int, int]], shared_bytes: int | None
) -> Any:
    """Take the steps of a builder, in its order."""
    kernels = FakeKernelCompiler(shared_bytes)
    plugins.compile_all = kernels.compile_all  # type: ignore[assignment]
    attributes = {one.name: one.type_(op.typical_dims[one.name]) for one in op.attributes}
    corners = [{**{name: size[corner] for name, size in sizes.items()}, **attributes} for corner in range(3)]
    fixed = {name: size[0] for name, size in sizes.items() if size[0] == size[2]}
    ports = (*op.inputs, *op.outputs)
    everything = [
        tensor_desc(
            op.dtype_of(port, type_bindings), *([evaluate(one, corner) for one in dim_tokens(port)] for corner in corners)
        )
        for port in ports
    ]
    count = len(op.inputs)
    inputs = [
        [dim_expr(lambda at, token=token: evaluate(token, at), fixed.get(token)) for token in dim_tokens(port)]  # type: ignore[misc]
        for port in op.inputs
    ]
    made = create_plugin(op)
    kinds = made.get_output_data_types([TYPES[op.dtype_of(port, type_bindings)] for port in op.inputs], [*map(len, inputs)])
    shapes = made.get_output_shapes(inputs, [], FakeExprBuilder())
    combination = made.get_supported_format_combinations(everything, count)
    made.configure_plugin(everything[:count], everything[count:])
    return {
        "types": [dtype_name(kind) for kind in kinds],
        "shapes": [[[size.value(at) for size in shape] for shape in shapes] for at in corners],
        "over": [made.get_aliased_input(i) for i in range(len(op.outputs))],
        "combination": [dtype_name(one.type) for one in combination],
        "tactics": [
            launch_parameters(made, tactic, inputs, everything, corners, kernels) for tactic in sorted(made.get_valid_tactics())
        ],
    }


def launch_parameters(
    plugin_instance: Any,
    tactic: int,
    inputs: list[Any],
    tensor_descs: list[Any],
    profile_points: list[Any],
    kernels: FakeKernelCompiler,
) -> Any:
    """Return the kernel of a tactic, and how it is launched at each corner of the profile."""
    launch, scalars, count = FakeLaunchParams(), FakeSymExprs(), len(inputs)
    plugin_instance.set_tactic(tactic)
    plugin_instance.get_launch_params(inputs, tensor_descs, count, launch, scalars, FakeExprBuilder())
    descriptions = [tensor.desc for tensor in tensor_descs]
    kernel, ptx = plugin_instance.get_kernel(descriptions[:count], descriptions[count:])
    return {
        "kernel": kernel,
        "ptx": ptx.decode(),
        "constants": kernels.last_specialization.constants,
        "multiples": kernels.last_specialization.divisible_by_16,
        "launches": [{key: value.expr.value(at) for key, value in vars(launch).items()} for at in profile_points],
        "scalars": [[scalars[i].expr.value(at) for i in range(scalars.nbSymExprs)] for at in profile_points],
    }


def register_ops() -> list[str]:
    """Return what the backend registers for a GPU of sm90."""
    backend.current_device_sm = lambda: SM  # type: ignore[assignment]
    builder = object.__new__(backend.TensorRTBuilder)
    builder.trt = trt
    builder.register_op_plugins()
    return [f"{namespace}::{name}" for name, namespace in REGISTRY.creators]


def answer_or_error(order: Mapping[str, Any]) -> Any:
    """Return the answer to an order, or the class and the words of its refusal."""
    try:
        return drive_builder(find_op(order["op"]), order["elements"], order["sizes"], order["shared"])
    except RyzenError as error:
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    orders = json.load(sys.stdin)
    told = register_ops() if orders == "register_ops" else [answer_or_error(order) for order in orders]
    sys.stdout.write("\n" + json.dumps(told))
