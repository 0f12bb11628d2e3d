"""Custom ops as TensorRT plugins, created through NVIDIA's own decorators and plugin creators.

The bindings are imported with stub libraries; `plugin_stubs.py` contains the other stubs. The tests compare what a builder
receives with the declaration of the op: shapes, types, tactics, launch parameters and the PTX.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile import registry
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels import Specialization
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.op import Op

SUPPORT = Path(__file__).parents[1] / "support"
OPS = [op for op in registry.ops().values() if op.kernel is not None]
MAX_SHARED_BYTES = 48 << 10
"""The shared memory that a launch may use, in bytes."""

PluginRequest = dict[str, Any]
"""A request to the plugin driver: an op, its element types and the sizes of its dims."""


def drive(requests: list[PluginRequest] | str, stubs: Path) -> Any:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    command = [sys.executable, str(SUPPORT / "plugin_driver.py")]
    process = subprocess.run(command, env=environment, input=json.dumps(requests), capture_output=True, text=True, check=False)
    if process.returncode:
        raise AssertionError(process.stderr[-3000:])
    return json.loads(process.stdout.splitlines()[-1])


def plugin_request(op: Op, fixed: set[str], *, shared: int | None = None, **sizes: tuple[int, int, int]) -> PluginRequest:
    """Return the request of `op` for a profile up to its typical dims; all dims except static dims and `fixed` are dynamic."""
    assert op.kernel is not None
    attribute_names = {attribute.name for attribute in op.attributes}
    typical = {name: int(value) for name, value in op.typical_dims.items() if name not in attribute_names}
    if "ROWS" in typical:
        typical |= {"R0": typical.pop("ROWS"), "R1": 1}
    profile_sizes = {
        name: (size // 2 + 1, size * 3 // 4, size) if size >= 8 else (size, size + 1, size + 2)
        for name, size in typical.items()
    }
    profile_sizes |= {name: (size[2],) * 3 for name, size in profile_sizes.items() if name in op.kernel.static_dims | fixed}
    elements = {
        variable: op.type_constraints[variable][-1 if len(op.type_constraints[variable]) < 3 else 1]
        for variable in op.type_variables
    }
    return {"op": op.name, "elements": elements, "sizes": profile_sizes | sizes, "shared": shared}


def dynamic_dims(op: Op) -> list[str]:
    """Return the dims that need not be known at build time."""
    assert op.kernel is not None
    return [name for name in plugin_request(op, set())["sizes"] if name not in op.kernel.static_dims]


def check(op: Op, request: PluginRequest, response: Any) -> None:
    """Compare what a builder received with the declaration of `op`, at each corner of the profile."""
    assert op.kernel is not None
    assert "refused" not in response, response
    elements, sizes = request["elements"], request["sizes"]
    attributes = {
        attribute.name: attribute.type_(np.float32(op.typical_dims[attribute.name])) for attribute in op.attributes
    }  # TensorRT passes floating-point attributes as float32
    corners: list[dict[str, Any]] = []
    for corner in range(3):
        at: dict[str, Any] = {name: size[corner] for name, size in sizes.items()} | attributes
        if "R0" in at:
            at |= {"ROWS": at["R0"] * at["R1"], "...": (at.pop("R0"), at.pop("R1"))}
        corners.append(at)
    trt_names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    dtypes = [op.dtype_of(param, elements) for param in (*op.inputs, *op.outputs)]
    assert response["combination"] == [trt_names.get(dtype, dtype.upper()) for dtype in dtypes]
    assert response["types"] == response["combination"][len(op.inputs) :]
    for at, shapes in zip(corners, response["shapes"], strict=True):
        assert [tuple(shape) for shape in shapes] == [dim_expr.shape_of(param.dims, at) for param in op.outputs]
    input_names = [param.name for param in op.inputs]
    assert response["over"] == [
        -1 if param.aliases_input is None else input_names.index(param.aliases_input) for param in op.outputs
    ]
    assert len(response["tactics"]) == len(op.kernel.tactics)
    largest = {name: value for name, value in corners[2].items() if name not in attributes and name != "..."}
    for tactic, compiled in enumerate(response["tactics"]):
        specialization = Specialization(op, elements, attributes, largest, tactic)
        assert compiled["constants"] == specialization.constants
        for at, launch, scalars in zip(corners, compiled["launches"], compiled["scalars"], strict=True):
            assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == specialization.grid(at)
            assert (launch["block_y"], launch["block_z"]) == (1, 1)
            assert scalars == specialization.scalars(at)
        static = {name for name, size in sizes.items() if size[0] == size[2]} | {*attributes}
        static_names = static | ({"ROWS"} if {"R0", "R1"} <= static else set())
        assert compiled["multiples"] == [
            name
            for (name, text), value in zip(op.kernel.scalars.items(), specialization.scalars(corners[2]), strict=True)
            if dim_expr.names_in(text) <= static_names and value % 16 == 0
        ]
        for launch in compiled["launches"]:
            assert launch["block_x"] == (32 * specialization.options["num_warps"] if request["shared"] is None else 128)
            assert launch["shared_mem"] <= MAX_SHARED_BYTES
        if request["shared"] is None:
            check_entry(specialization, compiled)


def check_entry(specialization: Specialization, compiled: Any) -> None:
    """Compare the parameters of the PTX entry with those of the kernel."""
    entry = re.search(rf"\.entry {compiled['kernel']}\((.*?)\)", compiled["ptx"], re.DOTALL)
    assert entry is not None
    widths = re.findall(r"\.param \.[us](\d+)", entry[1])
    parameter_types = [type_ for type_ in specialization.parameters.values() if type_ != "constexpr"]
    assert widths == ["64" if type_.startswith("*") else "32" for type_ in parameter_types]


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_builder_receives_what_the_op_declares(op: Op, nvidia_stubs: Path) -> None:
    """Every dim that need not be known at build time is symbolic."""
    request = plugin_request(op, set())
    (response,) = drive([request], nvidia_stubs)
    check(op, request, response)


def test_any_dim_may_be_fixed(nvidia_stubs: Path) -> None:
    """Fix each dim alone, all dims, and all dims but one."""
    cases: list[tuple[Op, PluginRequest]] = []
    for op in OPS:
        dims = dynamic_dims(op)
        for fixed in [*({name} for name in dims), {*dims}, *({*dims} - {name} for name in dims)]:
            cases.append((op, plugin_request(op, fixed, shared=0)))
    responses = drive([request for _, request in cases], nvidia_stubs)
    for (op, request), response in zip(cases, responses, strict=True):
        check(op, request, response)
    fixed_rows = {op.name: set[tuple[bool, bool]]() for op in OPS}
    for op, request in cases:
        if "R0" in request["sizes"]:
            fixed_rows[op.name].add((len({*request["sizes"]["R0"]}) == 1, len({*request["sizes"]["R1"]}) == 1))
    assert {(True, False), (False, True), (True, True)} <= fixed_rows["VectorQuantizeFp8"]


def test_constants_are_those_of_the_largest_shapes(nvidia_stubs: Path) -> None:
    """Use an op whose constants differ between the corners of the profile."""
    op = registry.find_op("KVAppendEvict")
    (response,) = drive([plugin_request(op, set(), shared=0, C=(100, 1000, 4000), S=(1, 3, 9))], nvidia_stubs)
    for compiled in response["tactics"]:
        assert (compiled["constants"]["BLOCK_C"], compiled["constants"]["BLOCK_S"]) == (4096, 16)
        assert [scalars[1:] for scalars in compiled["scalars"]] == [[100, 1], [1000, 3], [4000, 9]]


CONSTRAINT = "KVAppendEvict needs sinks + recent <= C, and here C ="


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"C": (1, 4096, 4096)}, f"at the smallest shapes of the profile: {CONSTRAINT} 1,"),
        ({"C": (67, 68, 4096)}, f"at the smallest shapes of the profile: {CONSTRAINT} 67,"),
        ({"S": (0, 1, 2)}, "at the smallest shapes of the profile: KVAppendEvict: S is 0, and must be in [1, "),
        ({"C": (68, 67, 4096)}, f"at the tuned shapes of the profile: {CONSTRAINT} 67,"),
        ({"C": (68, 68, 32769)}, "at the largest shapes of the profile: KVAppendEvict: C is 32769, and must be in [1, 32768]"),
        ({"D": (64, 96, 128)}, "KVAppendEvict: D must be known at build time"),
    ],
    ids=["smallest", "nearly", "empty", "tuned", "largest", "not static"],
)
def test_a_profile_outside_the_constraints_of_the_op_is_rejected(sizes: Any, message: str, nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    (response,) = drive([plugin_request(op, set(), shared=0, **sizes)], nvidia_stubs)
    assert response["refused"].startswith(f"ShapeError: {message}")


def test_the_smallest_valid_profile_is_accepted(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    (response,) = drive([plugin_request(op, set(), shared=0, C=(68, 68, 4096))], nvidia_stubs)
    assert "refused" not in response


def test_more_shared_memory_than_a_launch_may_use_is_rejected(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    at_limit, above_limit = drive(
        [plugin_request(op, set(), shared=shared) for shared in (MAX_SHARED_BYTES, MAX_SHARED_BYTES + 1)], nvidia_stubs
    )
    assert [launch["shared_mem"] for launch in at_limit["tactics"][0]["launches"]] == [MAX_SHARED_BYTES] * 3
    assert re.match(
        r"BackendError: KVAppendEvict\[float16\] .* tactic 0 needs 49153 bytes of shared memory, "
        r"but a launch by TensorRT may use 49152 bytes\n\nhint: lower the largest shapes",
        above_limit["refused"],
    )


def test_an_element_type_that_the_op_does_not_support_is_rejected(nvidia_stubs: Path) -> None:
    request = plugin_request(registry.find_op("KVAppendEvict"), set(), shared=0) | {"elements": {"T": "int32"}}
    (response,) = drive([request], nvidia_stubs)
    assert response["refused"].startswith(
        "BackendError: KVAppendEvict: `k` is DataType.INT32, and must be one of float32, float16"
    )


def test_the_backend_registers_the_ops_that_have_a_kernel_and_no_others(nvidia_stubs: Path) -> None:
    registered = drive("register_ops", nvidia_stubs)
    assert sorted(registered) == sorted(str(op) for op in OPS)
    assert "ryzen::TRT_Attention" not in registered
    assert len(OPS) < len(registry.ops())


def test_an_op_without_a_kernel_has_no_plugin() -> None:
    attention = registry.find_op("TRT_Attention")
    with pytest.raises(BackendError, match="TRT_Attention has no kernel: every runtime runs its reference"):
        _ = Specialization(attention, {"T": "float32", "M": "bool", "I": "int64"}, {}, {}).kernel
