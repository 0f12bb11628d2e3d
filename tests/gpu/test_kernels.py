"""Kernels on a GPU: compiled ahead of time, launched with TensorRT's argument list, and compared with the references."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.kernels import compile_all
from ryzen_compile.kernels.driver import CodeFormat, Launcher
from ryzen_compile.kernels.specialization import Specialization
from ryzen_compile.ops import verification
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.record import utc_now

pytestmark = pytest.mark.gpu
OPS = [op for op in registry.ops().values() if op.kernel is not None]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def references() -> Iterator[ReferenceRunner]:
    with ReferenceRunner() as started:
        yield started


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


def all_specializations(op: Op) -> list[Specialization]:
    """Return the test cases with every tactic, since on a GPU tactics also differ if they change only warps."""
    assert op.kernel is not None
    specializations = []
    for case in verification.test_specializations(op):
        if case.tactic == 0:
            general = [
                Specialization(op, case.type_bindings, case.attributes, case.dims, tactic)
                for tactic in range(len(op.kernel.tactics))
            ]
            divisible = [specialization.with_divisibility() for specialization in general]
            specializations += general + [specialization for specialization in divisible if specialization.divisible_by_16]
    return specializations


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_kernels_match_the_references(op: Op, launcher: Launcher, references: ReferenceRunner, store: Store) -> None:
    specializations = all_specializations(op)
    compiled = compile_all(specializations, [launcher.sm], store=store)
    code_formats: tuple[CodeFormat, ...] = ("ptx", "cubin")
    count = 0
    assert op.make_inputs is not None
    for index, specialization in enumerate(specializations):
        for seed, code_format in enumerate(code_formats):
            random_inputs = op.make_inputs(np.random.default_rng(seed), specialization.dims, specialization.attributes)
            inputs = cast_inputs(op, specialization.type_bindings, random_inputs)
            expected = references.run(op, specialization.type_bindings, specialization.attributes, inputs)
            actual = launcher.run(specialization, compiled[index, launcher.sm], inputs, code_format=code_format)
            mismatch = find_mismatch(op, specialization.type_bindings, actual, expected, tolerance_factor=2)
            assert mismatch is None, f"{specialization} from {code_format}: {mismatch}"
            count += 1
    machine = f"{detect_gpus()[0].name} (sm{launcher.sm})"
    versions = {name: version(name) for name in ("triton", "onnx", "cuda-core")}
    verification.save_check(
        op, verification.OpCheck(machine=machine, cases=count, timestamp=utc_now(), versions=versions), store
    )


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_repeated_runs_are_bitwise_identical(op: Op, launcher: Launcher, store: Store) -> None:
    """Kernels use no atomics on outputs and a fixed order of reduction."""
    specialization = all_specializations(op)[0]
    compiled = compile_all([specialization], [launcher.sm], store=store)[0, launcher.sm]
    assert op.make_inputs is not None
    inputs = cast_inputs(
        op,
        specialization.type_bindings,
        op.make_inputs(np.random.default_rng(0), specialization.dims, specialization.attributes),
    )
    first, *others = (launcher.run(specialization, compiled, inputs) for _ in range(5))
    for other in others:
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes()
