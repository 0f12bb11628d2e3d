"""What holds of every op that has a kernel, whatever it computes."""

from __future__ import annotations

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
each = pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))


def half(op: Op) -> dict[str, str]:
    return {name: "float16" if "float16" in elements else elements[0] for name, elements in op.type_constraints.items()}


@each
def test_the_declaration_is_whole(op: Op) -> None:
    assert op.formula.strip()
    assert op.bytes_moved
    assert op.test_cases
    assert op.tolerance is not None
    assert {*op.tolerance} >= {element for elements in op.type_constraints.values() for element in elements} - {
        "bool",
        "int32",
        "int64",
    }
    for case in (op.typical_dims, *op.test_cases):
        attributes, sizes = verification.split_case(op, case)
        assert op.check_attributes(attributes) == attributes
        op.check_dims({**sizes, **attributes})
    page = Path(registry.source_path("ops", folder(op))).with_name("README.md").read_text(encoding="utf-8")
    assert op.name in page
    for heading in ("## Bytes", "## The kernel", "## Limits"):
        assert heading in page


def folder(op: Op) -> str:
    """Return the member of the room that declares `op`."""
    (found,) = (name for name, module in registry.import_members("ops").items() if op in vars(module).values())
    return found


@each
def test_what_it_draws_fits_its_ports(op: Op) -> None:
    assert op.make_inputs is not None
    for case in op.test_cases:
        attributes, sizes = verification.split_case(op, case)
        drawn = op.make_inputs(np.random.default_rng(0), sizes, attributes)
        known = op.bind_dims({name: array.shape for name, array in drawn.items()}, attributes)
        assert {name: known[name] for name in sizes} == sizes
        assert {*drawn} == {port.name for port in op.inputs}
        for port in op.inputs:
            floating = numpy_dtype(op.dtype_of(port, half(op))).kind in "fV"
            assert drawn[port.name].dtype == (np.float64 if floating else numpy_dtype(op.dtype_of(port, half(op))))


@each
def test_kernel_and_reference_agree_on_its_cases(op: Op, tmp_path: Path) -> None:
    store = Store(tmp_path)
    done = verification.check_op(op, store)
    assert done is not None
    assert verification.load_verification(op, store).checks == (done,)


@each
def test_a_graph_of_it_with_symbolic_dims_builds_for_rtx(op: Op, tmp_path: Path) -> None:
    """Half precision, sm86, sm89 and sm120, from its reference: built, not executed."""
    assert op.kernel is not None
    attributes, sizes = verification.split_case(op, op.typical_dims)
    fixed = {name: sizes[name] for name in op.kernel.static_dims}
    model = single_op_model(op, half(op), attributes, fixed)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "op.onnx"
    path.write_bytes(model.SerializeToString())
    ranges = {name: (size, size, size) if name in fixed else (low(op, name), size, size) for name, size in sizes.items()}
    request = BuildRequest(
        onnx_path=str(path),
        output=str(tmp_path / "op.plan"),
        targets=parse_targets("sm86,sm89,sm120"),
        profiles=(single_op_profile(op, ranges),),
    )
    built = BACKEND.build(request, SilentProgress())
    assert built.targets == ("sm86", "sm89", "sm120")
    assert built.size_bytes > 0


def low(op: Op, name: str) -> int:
    """Return the lowest that a dim may be where the others are typical."""
    size = int(op.typical_dims[name])
    lowest = op.dim_limits.get(name, (1, size))[0]
    while lowest < size:
        try:
            op.check_dims({**op.typical_dims, name: lowest})
            return lowest
        except Exception:  # noqa: BLE001
            lowest *= 2
    return size


@each
def test_the_bytes_it_moves_are_those_of_its_ports(op: Op) -> None:
    """No less than every output that is not written over an input, and no more than all ports twice."""
    attributes, sizes = verification.split_case(op, op.typical_dims)
    known: dict[str, Any] = {**sizes, **attributes, "...": (sizes.get("ROWS", 1),)}
    widths = {f"size_{name}": numpy_dtype(element).itemsize for name, element in half(op).items()}
    assert op.bytes_moved is not None
    moved = dim_expr.evaluate(op.bytes_moved, {**known, **widths})

    def size(port: Any) -> int:
        count = int(np.prod(dim_expr.shape_of(port.dims, known), dtype=np.int64))
        return count * numpy_dtype(op.dtype_of(port, half(op))).itemsize

    assert moved >= sum(size(port) for port in op.outputs if port.aliases_input is None)
    assert moved <= 2 * sum(size(port) for port in (*op.inputs, *op.outputs))


@each
def test_a_model_that_holds_it_goes_through_the_whole_tool(op: Op, tmp_path: Path) -> None:
    """Built for the CPU and, in half precision, for a GPU; compared with itself; run from its package."""
    attributes, sizes = verification.split_case(op, op.test_cases[0])
    elements = half(op)  # what an op makes of other types is its own, and codes would not be equal
    path = tmp_path / "op.onnx"
    path.write_bytes(single_op_model(op, elements, attributes, sizes).SerializeToString())
    package = rc.build(path, gpu="cpu,sm89", precision="fp16", cache=False)
    assert op.make_inputs is not None
    given = cast_inputs(op, elements, op.make_inputs(np.random.default_rng(0), sizes, attributes))
    with rc.load(package.path) as engine, ReferenceRunner() as references:
        found = engine.run(**given)
        meant = references.run(op, elements, attributes, given)
    assert find_mismatch(op, elements, found, meant, tolerance_factor=2) is None
