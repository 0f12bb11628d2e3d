"""Execution of kernels by Triton's interpreter: detection of invalid writes, and recovery from crashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.declared_op import declared_op

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels import Interpreter, Specialization
from ryzen_compile.spec.op import KernelSpec

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
KERNEL = KernelSpec(source="", scalars={"count": "N"}, constants={"STEP": "4"}, grid=("ceil_div(N, 4)",))
OP = declared_op(tolerance={"float32": 0.0}, kernel=KERNEL)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    folder: Path = tmp_path_factory.mktemp("bodies")
    for name, body in BODIES.items():
        (folder / f"body_{name}.py").write_text(SOURCE.format(name=name, body=body))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        with Interpreter() as started:
            yield started


def specialization(name: str, count: int) -> Specialization:
    assert OP.kernel is not None
    kernel = dataclasses.replace(OP.kernel, source=f"body_{name}:{name}")
    return Specialization(dataclasses.replace(OP, kernel=kernel), {"T": "float32"}, {}, {"N": count})


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_outputs_are_returned(interpreter: Interpreter, count: int) -> None:
    x = np.arange(count, dtype=np.float32)
    np.testing.assert_array_equal(interpreter.run(specialization("doubles", count), {"x": x})["y"], 2 * x)


@pytest.mark.parametrize("name", ["overruns", "underruns"])
def test_a_write_next_to_a_tensor_is_reported(interpreter: Interpreter, name: str) -> None:
    with pytest.raises(BackendError, match="the kernel wrote outside of `y`"):
        interpreter.run(specialization(name, 3), {"x": np.ones(3, np.float32)})


def test_a_write_to_an_input_is_reported(interpreter: Interpreter) -> None:
    with pytest.raises(BackendError, match="the kernel wrote over its input `x`"):
        interpreter.run(specialization("spoils", 3), {"x": np.ones(3, np.float32)})


def test_a_failing_kernel_is_reported(interpreter: Interpreter) -> None:
    with pytest.raises(BackendError, match="name 'z' is not defined"):
        interpreter.run(specialization("fails", 3), {"x": np.ones(3, np.float32)})


def test_a_kernel_that_crashes_the_process_does_not_affect_the_next_run(interpreter: Interpreter) -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(BackendError, match=r"the process that runs Triton died \(exit -11\)"):
        interpreter.run(specialization("dies", 3), {"x": x})
    np.testing.assert_array_equal(interpreter.run(specialization("doubles", 3), {"x": x})["y"], 2 * x)


def test_inputs_of_the_wrong_rank_are_rejected(interpreter: Interpreter) -> None:
    with pytest.raises(ShapeError, match=r"Declared: `x` has 2 dimensions, but is declared as \(N\)"):
        interpreter.run(specialization("doubles", 3), {"x": np.ones((3, 3), np.float32)})
