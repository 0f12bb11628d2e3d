"""Script that drives the TensorRT plugins of custom ops like a builder, through NVIDIA's bindings, and prints the results.

Standard input is JSON: a list of requests. A request names the `op`, its `elements` (type variable -> element type), and the
`sizes` of its dims as (minimum, optimum, maximum), where `...` is `R0 R1`; a dim of one size is static. If `shared` is set,
kernels are not compiled, and a fake kernel uses that many bytes of shared memory. The string "register_ops" instead of a list
makes the backend register all ops for sm90.
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
from ryzen_compile.backends.tensorrt import builder as tensorrt_builder
from ryzen_compile.errors import RyzenError
from ryzen_compile.kernels import Specialization, compile_all
from ryzen_compile.kernels.aot import CompiledKernel
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dim_expr import evaluate
from ryzen_compile.spec.op import Op, TensorParam

SM = 90


class FakeKernelCompiler:
    """Compiles kernels or returns fake ones, and records the last specialization."""

    def __init__(self, shared_bytes: int | None) -> None:
        self.shared_bytes = shared_bytes
        self.last_specialization: Specialization

    def compile_all(
        self, specializations: list[Specialization], sms: list[int], *, store: Store
    ) -> dict[tuple[int, int], CompiledKernel]:
        (self.last_specialization,) = specializations
        if self.shared_bytes is None:
            return compile_all(specializations, sms, store=store)
        fields = {"cubin": b"", "registers": 0, "spilled_bytes": 0, "hidden": 0, "triton": ""}
        return {(0, SM): CompiledKernel(name="k", sm=SM, ptx="", shared_bytes=self.shared_bytes, threads=128, **fields)}


@functools.cache
def plugin_creator(name: str) -> Any:
    op = find_op(name)
    plugins.register_plugin(op, trt, trtp, sm=SM, store=Store())
    return REGISTRY.get_creator(op.name, "1", op.domain)


def create_plugin(op: Op) -> Any:
    types = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = [
        trt.PluginField(
            attribute.name, np.array([op.typical_dims[attribute.name]], types[attribute.type_][0]), types[attribute.type_][1]
        )
        for attribute in op.attributes
    ]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return plugin_creator(op.name).create_plugin(op.name, op.domain, fields, trt.TensorRTPhase.BUILD, request)


def dim_tokens(param: TensorParam) -> list[str]:
    return param.dims.replace("...", "R0 R1").split()


def drive_builder(
    op: Op, type_bindings: Mapping[str, str], sizes: Mapping[str, tuple[int, int, int]], shared_bytes: int | None
) -> Any:
    """Call the plugin's methods in the order of a builder and return their results."""
    kernels = FakeKernelCompiler(shared_bytes)
    plugins.compile_all = kernels.compile_all  # type: ignore[assignment]
    attributes = {attribute.name: attribute.type_(op.typical_dims[attribute.name]) for attribute in op.attributes}
    corners = [{**{name: size[corner] for name, size in sizes.items()}, **attributes} for corner in range(3)]
    static_sizes = {name: size[0] for name, size in sizes.items() if size[0] == size[2]}
    params = (*op.inputs, *op.outputs)
    tensor_descs = [
        tensor_desc(
            op.dtype_of(param, type_bindings), *([evaluate(token, corner) for token in dim_tokens(param)] for corner in corners)
        )
        for param in params
    ]
    input_count = len(op.inputs)
    inputs = [
        [dim_expr(lambda point, token=token: evaluate(token, point), static_sizes.get(token)) for token in dim_tokens(param)]  # type: ignore[misc]
        for param in op.inputs
    ]
    plugin = create_plugin(op)
    output_types = plugin.get_output_data_types(
        [TYPES[op.dtype_of(param, type_bindings)] for param in op.inputs], [*map(len, inputs)]
    )
    shapes = plugin.get_output_shapes(inputs, [], FakeExprBuilder())
    formats = plugin.get_supported_format_combinations(tensor_descs, input_count)
    plugin.configure_plugin(tensor_descs[:input_count], tensor_descs[input_count:])
    return {
        "types": [dtype_name(output_type) for output_type in output_types],
        "shapes": [[[size.value(point) for size in shape] for shape in shapes] for point in corners],
        "over": [plugin.get_aliased_input(i) for i in range(len(op.outputs))],
        "combination": [dtype_name(tensor.type) for tensor in formats],
        "tactics": [
            launch_parameters(plugin, tactic, inputs, tensor_descs, corners, kernels)
            for tactic in sorted(plugin.get_valid_tactics())
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
    """Return the kernel of a tactic, and its launch parameters at each corner of the profile."""
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
        "launches": [{key: value.expr.value(point) for key, value in vars(launch).items()} for point in profile_points],
        "scalars": [[scalars[i].expr.value(point) for i in range(scalars.nbSymExprs)] for point in profile_points],
    }


def register_ops() -> list[str]:
    """Return the names of the plugins that the backend registers for sm90."""
    tensorrt_builder.current_device_sm = lambda: SM  # type: ignore[assignment]
    builder = object.__new__(tensorrt_builder.TensorRTBuilder)
    builder.trt = trt
    builder.register_op_plugins()
    return [f"{namespace}::{name}" for name, namespace in REGISTRY.creators]


def answer_or_error(request: Mapping[str, Any]) -> Any:
    """Return the result of a request, or the type and message of its error."""
    try:
        return drive_builder(find_op(request["op"]), request["elements"], request["sizes"], request["shared"])
    except RyzenError as error:
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    results = register_ops() if requests == "register_ops" else [answer_or_error(request) for request in requests]
    sys.stdout.write("\n" + json.dumps(results))
