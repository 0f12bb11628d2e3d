"""Custom ops as TensorRT plugins, made through NVIDIA's own decorators and creators.

Their bindings load once three libraries are there, which are stubs; see `plugin_stands.py` for what else stands in. What a
builder would get is held against the declaration: shapes, types, tactics, launches, and the PTX itself.
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
MOST = 48 << 10
"""The bytes of shared memory that a launch may have."""

Order = dict[str, Any]


def drive(orders: list[Order] | str, stubs: Path) -> Any:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    command = [sys.executable, str(SUPPORT / "plugin_driver.py")]
    done = subprocess.run(command, env=environment, input=json.dumps(orders), capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def ordered(op: Op, fixed: set[str], *, shared: int | None = None, **sizes: tuple[int, int, int]) -> Order:
    """Return the order to drive `op` at its typical dims and below; all dims but the `exact` and the `fixed` are dynamic."""
    assert op.kernel is not None
    names = {one.name for one in op.attributes}
    typical = {name: int(value) for name, value in op.typical_dims.items() if name not in names}
    if "ROWS" in typical:
        typical |= {"R0": typical.pop("ROWS"), "R1": 1}
    chosen = {
        name: (size // 2 + 1, size * 3 // 4, size) if size >= 8 else (size, size + 1, size + 2)
        for name, size in typical.items()
    }
    chosen |= {name: (size[2],) * 3 for name, size in chosen.items() if name in op.kernel.static_dims | fixed}
    elements = {
        variable: op.type_constraints[variable][-1 if len(op.type_constraints[variable]) < 3 else 1]
        for variable in op.type_variables
    }
    return {"op": op.name, "elements": elements, "sizes": chosen | sizes, "shared": shared}


def dynamic(op: Op) -> list[str]:
    """Return the dims that need not be known when the engine is built."""
    assert op.kernel is not None
    return [name for name in ordered(op, set())["sizes"] if name not in op.kernel.static_dims]


def check(op: Op, order: Order, answer: Any) -> None:
    """Hold what a builder got against the declaration of `op`, at each corner of the profile."""
    assert op.kernel is not None
    assert "refused" not in answer, answer
    elements, sizes = order["elements"], order["sizes"]
    attributes = {
        one.name: one.type_(np.float32(op.typical_dims[one.name])) for one in op.attributes
    }  # TensorRT has no wider floats
    corners: list[dict[str, Any]] = []
    for corner in range(3):
        at: dict[str, Any] = {name: size[corner] for name, size in sizes.items()} | attributes
        if "R0" in at:
            at |= {"ROWS": at["R0"] * at["R1"], "...": (at.pop("R0"), at.pop("R1"))}
        corners.append(at)
    named = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    kinds = [op.dtype_of(port, elements) for port in (*op.inputs, *op.outputs)]
    assert answer["combination"] == [named.get(kind, kind.upper()) for kind in kinds]
    assert answer["types"] == answer["combination"][len(op.inputs) :]
    for at, shapes in zip(corners, answer["shapes"], strict=True):
        assert [tuple(shape) for shape in shapes] == [dim_expr.shape_of(port.dims, at) for port in op.outputs]
    names = [port.name for port in op.inputs]
    assert answer["over"] == [-1 if port.aliases_input is None else names.index(port.aliases_input) for port in op.outputs]
    assert len(answer["tactics"]) == len(op.kernel.tactics)
    largest = {name: value for name, value in corners[2].items() if name not in attributes and name != "..."}
    for tactic, found in enumerate(answer["tactics"]):
        instance = Specialization(op, elements, attributes, largest, tactic)
        assert found["constants"] == instance.constants
        for at, launch, scalars in zip(corners, found["launches"], found["scalars"], strict=True):
            assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == instance.grid(at)
            assert (launch["block_y"], launch["block_z"]) == (1, 1)
            assert scalars == instance.scalars(at)
        static = {name for name, size in sizes.items() if size[0] == size[2]} | {*attributes}
        known = static | ({"ROWS"} if {"R0", "R1"} <= static else set())
        assert found["multiples"] == [
            name
            for (name, text), value in zip(op.kernel.scalars.items(), instance.scalars(corners[2]), strict=True)
            if dim_expr.names_in(text) <= known and value % 16 == 0
        ]
        for launch in found["launches"]:
            assert launch["block_x"] == (32 * instance.options["num_warps"] if order["shared"] is None else 128)
            assert launch["shared_mem"] <= MOST
        if order["shared"] is None:
            check_entry(instance, found)


def check_entry(instance: Specialization, found: Any) -> None:
    """Hold the parameters of the PTX against those of the kernel."""
    entry = re.search(rf"\.entry {found['kernel']}\((.*?)\)", found["ptx"], re.DOTALL)
    assert entry is not None
    widths = re.findall(r"\.param \.[us](\d+)", entry[1])
    expected = [kind for kind in instance.parameters.values() if kind != "constexpr"]
    assert widths == ["64" if kind.startswith("*") else "32" for kind in expected]


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_builder_gets_what_the_op_declares(op: Op, nvidia_stubs: Path) -> None:
    """Every dim that need not be known when the engine is built is a symbol."""
    order = ordered(op, set())
    (answer,) = drive([order], nvidia_stubs)
    check(op, order, answer)


def test_any_dim_may_be_fixed(nvidia_stubs: Path) -> None:
    """Each in turn, all of them, and all but one."""
    cases: list[tuple[Op, Order]] = []
    for op in OPS:
        free = dynamic(op)
        for fixed in [*({name} for name in free), {*free}, *({*free} - {name} for name in free)]:
            cases.append((op, ordered(op, fixed, shared=0)))
    answers = drive([order for _, order in cases], nvidia_stubs)
    for (op, order), answer in zip(cases, answers, strict=True):
        check(op, order, answer)
    leads = {op.name: set[tuple[bool, bool]]() for op in OPS}
    for op, order in cases:
        if "R0" in order["sizes"]:
            leads[op.name].add((len({*order["sizes"]["R0"]}) == 1, len({*order["sizes"]["R1"]}) == 1))
    assert {(True, False), (False, True), (True, True)} <= leads["VectorQuantizeFp8"]


def test_constants_are_those_of_the_largest_shapes(nvidia_stubs: Path) -> None:
    """Shown by an op whose constants differ from one corner of the profile to the next."""
    op = registry.find_op("KVAppendEvict")
    (answer,) = drive([ordered(op, set(), shared=0, C=(100, 1000, 4000), S=(1, 3, 9))], nvidia_stubs)
    for found in answer["tactics"]:
        assert (found["constants"]["BLOCK_C"], found["constants"]["BLOCK_S"]) == (4096, 16)
        assert [scalars[1:] for scalars in found["scalars"]] == [[100, 1], [1000, 3], [4000, 9]]


NEEDS = "KVAppendEvict needs sinks + recent <= C, and here C ="


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"C": (1, 4096, 4096)}, f"at the smallest shapes of the profile: {NEEDS} 1,"),
        ({"C": (67, 68, 4096)}, f"at the smallest shapes of the profile: {NEEDS} 67,"),
        ({"S": (0, 1, 2)}, "at the smallest shapes of the profile: KVAppendEvict: S is 0, and must be in [1, "),
        ({"C": (68, 67, 4096)}, f"at the tuned shapes of the profile: {NEEDS} 67,"),
        ({"C": (68, 68, 32769)}, "at the largest shapes of the profile: KVAppendEvict: C is 32769, and must be in [1, 32768]"),
        ({"D": (64, 96, 128)}, "KVAppendEvict: D must be known when the engine is built"),
    ],
    ids=["smallest", "nearly", "empty", "tuned", "largest", "not exact"],
)
def test_a_profile_beyond_what_the_op_can_do_is_refused(sizes: Any, says: str, nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    (answer,) = drive([ordered(op, set(), shared=0, **sizes)], nvidia_stubs)
    assert answer["refused"].startswith(f"ShapeError: {says}")


def test_the_smallest_profile_that_holds_is_taken(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    (answer,) = drive([ordered(op, set(), shared=0, C=(68, 68, 4096))], nvidia_stubs)
    assert "refused" not in answer


def test_more_shared_memory_than_a_launch_has_is_refused(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    enough, more = drive([ordered(op, set(), shared=shared) for shared in (MOST, MOST + 1)], nvidia_stubs)
    assert [launch["shared_mem"] for launch in enough["tactics"][0]["launches"]] == [MOST] * 3
    assert re.match(
        r"BackendError: KVAppendEvict\[float16\] .* tactic 0 needs 49153 bytes of shared memory, "
        r"and a launch by TensorRT has 49152\n\nhint: lower the largest shapes",
        more["refused"],
    )


def test_a_type_that_the_op_does_not_take_is_refused(nvidia_stubs: Path) -> None:
    order = ordered(registry.find_op("KVAppendEvict"), set(), shared=0) | {"elements": {"T": "int32"}}
    (answer,) = drive([order], nvidia_stubs)
    assert answer["refused"].startswith(
        "BackendError: KVAppendEvict: `k` is DataType.INT32, and must be one of float32, float16"
    )


def test_the_backend_registers_the_ops_that_have_a_kernel_and_no_others(nvidia_stubs: Path) -> None:
    registered = drive("register_ops", nvidia_stubs)
    assert sorted(registered) == sorted(str(op) for op in OPS)
    assert "ryzen::TRT_Attention" not in registered
    assert len(OPS) < len(registry.ops())


def test_an_op_without_a_kernel_cannot_be_one() -> None:
    attention = registry.find_op("TRT_Attention")
    with pytest.raises(BackendError, match="TRT_Attention has no kernel: every runtime runs its reference"):
        _ = Specialization(attention, {"T": "float32", "M": "bool", "I": "int64"}, {}, {}).kernel
