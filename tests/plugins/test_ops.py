"""Tests of every op with a kernel: declaration, inputs, agreement of implementations, builds and packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.ops import verification
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch, single_op_model, single_op_profile
from ryzen_compile.progress import SilentProgress
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.target import parse_targets

OPS = [op for op in registry.ops().values() if op.kernel is not None]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))


def half_type_bindings(op: Op) -> dict[str, str]:
    return {name: "float16" if "float16" in elements else elements[0] for name, elements in op.type_constraints.items()}


@each_op
def test_the_declaration_is_complete(op: Op) -> None:
    assert op.formula.strip()
    assert op.bytes_moved
    assert op.test_cases
    assert op.tolerance is not None
    assert {*op.tolerance} >= {dtype for dtypes in op.type_constraints.values() for dtype in dtypes} - {
        "bool",
        "int32",
        "int64",
    }
    for case in (op.typical_dims, *op.test_cases):
        attributes, sizes = verification.split_case(op, case)
        assert op.check_attributes(attributes) == attributes
        op.check_dims({**sizes, **attributes})
    readme = Path(registry.source_path("ops", member_name(op))).with_name("README.md").read_text(encoding="utf-8")
    assert op.name in readme
    for heading in ("## Bytes", "## The kernel", "## Limits"):
        assert heading in readme


def member_name(op: Op) -> str:
    """Return the member of the registry group `ops` that declares `op`."""
    modules = {name: importlib.import_module(registry.module_name("ops", name)) for name in registry.names("ops")}
    (member,) = (name for name, module in modules.items() if op in vars(module).values())
    return member


@each_op
def test_make_inputs_matches_the_signature(op: Op) -> None:
    assert op.make_inputs is not None
    for case in op.test_cases:
        attributes, sizes = verification.split_case(op, case)
        inputs = op.make_inputs(np.random.default_rng(0), sizes, attributes)
        bound = op.bind_dims({name: array.shape for name, array in inputs.items()}, attributes)
        assert {name: bound[name] for name in sizes} == sizes
        assert {*inputs} == {param.name for param in op.inputs}
        for param in op.inputs:
            is_float = numpy_dtype(op.dtype_of(param, half_type_bindings(op))).kind in "fV"
            assert inputs[param.name].dtype == (
                np.float64 if is_float else numpy_dtype(op.dtype_of(param, half_type_bindings(op)))
            )


@each_op
def test_kernel_and_reference_agree_on_the_test_cases(op: Op, tmp_path: Path) -> None:
    store = Store(tmp_path)
    check = verification.check_op(op, store)
    assert check is not None
    assert verification.load_verification(op, store).checks == (check,)


@each_op
def test_a_graph_with_dynamic_dims_builds_for_rtx(op: Op, tmp_path: Path) -> None:
    """The reference in half precision is built for sm86, sm89 and sm120, but not executed."""
    assert op.kernel is not None
    attributes, sizes = verification.split_case(op, op.typical_dims)
    fixed = {name: sizes[name] for name in op.kernel.static_dims}
    model = single_op_model(op, half_type_bindings(op), attributes, fixed)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "op.onnx"
    path.write_bytes(model.SerializeToString())
    ranges = {
        name: (size, size, size) if name in fixed else (minimum_size(op, name), size, size) for name, size in sizes.items()
    }
    request = BuildRequest(
        onnx_path=str(path),
        output=str(tmp_path / "op.plan"),
        targets=parse_targets("sm86,sm89,sm120"),
        profiles=(single_op_profile(op, ranges),),
    )
    built = BACKEND.build(request, SilentProgress())
    assert built.target_names == ("sm86", "sm89", "sm120")
    assert built.size_bytes > 0


def minimum_size(op: Op, name: str) -> int:
    """Return the minimum size of a dim if all other dims are typical."""
    size = int(op.typical_dims[name])
    minimum = op.dim_limits.get(name, (1, size))[0]
    while minimum < size:
        try:
            op.check_dims({**op.typical_dims, name: minimum})
            return minimum
        except Exception:  # noqa: BLE001
            minimum *= 2
    return size


@each_op
def test_bytes_moved_is_consistent_with_the_tensor_sizes(op: Op) -> None:
    """At least the size of all outputs that alias no input, and at most twice the size of all inputs and outputs."""
    attributes, sizes = verification.split_case(op, op.typical_dims)
    values: dict[str, Any] = {**sizes, **attributes, "...": (sizes.get("ROWS", 1),)}
    element_sizes = {f"size_{name}": numpy_dtype(dtype).itemsize for name, dtype in half_type_bindings(op).items()}
    assert op.bytes_moved is not None
    moved = dim_expr.evaluate(op.bytes_moved, {**values, **element_sizes})

    def tensor_bytes(param: Any) -> int:
        count = int(np.prod(dim_expr.shape_of(param.dims, values), dtype=np.int64))
        return count * numpy_dtype(op.dtype_of(param, half_type_bindings(op))).itemsize

    assert moved >= sum(tensor_bytes(param) for param in op.outputs if param.aliases_input is None)
    assert moved <= 2 * sum(tensor_bytes(param) for param in (*op.inputs, *op.outputs))


@each_op
def test_a_model_with_the_op_is_built_and_run(op: Op, tmp_path: Path) -> None:
    """The model is built for the CPU and, in half precision, for a GPU, compared with itself, and run from its package."""
    attributes, sizes = verification.split_case(op, op.test_cases[0])
    type_bindings = half_type_bindings(op)  # with other types results may differ by rounding, and codes would not be equal
    path = tmp_path / "op.onnx"
    path.write_bytes(single_op_model(op, type_bindings, attributes, sizes).SerializeToString())
    package = rc.build(path, gpu="cpu,sm89", precision="fp16", cache=False)
    assert op.make_inputs is not None
    inputs = cast_inputs(op, type_bindings, op.make_inputs(np.random.default_rng(0), sizes, attributes))
    with rc.load(package.path) as engine, ReferenceRunner() as references:
        actual = engine.run(**inputs)
        expected = references.run(op, type_bindings, attributes, inputs)
    assert find_mismatch(op, type_bindings, actual, expected, tolerance_factor=2) is None
