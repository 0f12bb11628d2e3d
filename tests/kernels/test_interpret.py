"""Triton's interpreter as a runner: what a kernel does to memory that is not its own is told, and survived."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels import Interpreter, Specialization
from ryzen_compile.spec.op import KernelSpec, Op, TensorParam

SOURCE = """
import triton
import triton.language as tl

@triton.jit
def {name}(x, count, y, STEP: tl.constexpr):
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    {body}
"""
BODIES = {
    "doubles": "tl.store(y + i, 2 * tl.load(x + i, mask=i < count), mask=i < count)",
    "overruns": "tl.store(y + i, 2 * tl.load(x + i, mask=i < count))",
    "underruns": "tl.store(y + i - 1, 2 * tl.load(x + i, mask=i < count), mask=i < count)",
    "dies": "tl.store(y + i + (1 << 40), 1.0)",
    "spoils": "tl.store(y + i, 2 * tl.load(x + i, mask=i < count), mask=i < count); tl.store(x + i, 0.0, mask=i < count)",
    "fails": "tl.store(y + i, z)",
}
OP = Op(
    domain="tests",
    name="Doubles",
    version=1,
    description="2 * x",
    inputs=(TensorParam("x", "T", "N"),),
    outputs=(TensorParam("y", "T", "N"),),
    type_constraints={"T": ("float32",)},
    reference="nowhere:nothing",
    tolerance={"float32": 0.0},
    kernel=KernelSpec(source="", scalars={"count": "N"}, constants={"STEP": "4"}, grid=("ceil_div(N, 4)",)),
)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    folder: Path = tmp_path_factory.mktemp("bodies")
    for name, body in BODIES.items():
        (folder / f"body_{name}.py").write_text(SOURCE.format(name=name, body=body))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        with Interpreter() as found:
            yield found


def instance(name: str, count: int) -> Specialization:
    assert OP.kernel is not None
    kernel = dataclasses.replace(OP.kernel, source=f"body_{name}:{name}")
    return Specialization(dataclasses.replace(OP, kernel=kernel), {"T": "float32"}, {}, {"N": count})


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_outputs_come_back(interpreter: Interpreter, count: int) -> None:
    x = np.arange(count, dtype=np.float32)
    np.testing.assert_array_equal(interpreter.run(instance("doubles", count), {"x": x})["y"], 2 * x)


@pytest.mark.parametrize("name", ["overruns", "underruns"])
def test_a_write_beside_a_tensor_is_told(interpreter: Interpreter, name: str) -> None:
    with pytest.raises(BackendError, match="the kernel wrote outside of `y`"):
        interpreter.run(instance(name, 3), {"x": np.ones(3, np.float32)})


def test_a_write_over_an_input_is_told(interpreter: Interpreter) -> None:
    with pytest.raises(BackendError, match="the kernel wrote over its input `x`"):
        interpreter.run(instance("spoils", 3), {"x": np.ones(3, np.float32)})


def test_what_fails_is_told(interpreter: Interpreter) -> None:
    with pytest.raises(BackendError, match="name 'z' is not defined"):
        interpreter.run(instance("fails", 3), {"x": np.ones(3, np.float32)})


def test_a_kernel_that_kills_the_process_does_not_stop_the_next(interpreter: Interpreter) -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(BackendError, match=r"the process that runs Triton died \(exit -11\)"):
        interpreter.run(instance("dies", 3), {"x": x})
    np.testing.assert_array_equal(interpreter.run(instance("doubles", 3), {"x": x})["y"], 2 * x)


def test_inputs_that_do_not_fit_are_refused(interpreter: Interpreter) -> None:
    with pytest.raises(ShapeError, match=r"Doubles: `x` has 2 dimensions, and is declared as \(N\)"):
        interpreter.run(instance("doubles", 3), {"x": np.ones((3, 3), np.float32)})
