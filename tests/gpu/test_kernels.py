"""Kernels on a GPU: what is compiled ahead of time, launched with TensorRT's argument list, does what the references say."""

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
    with Launcher() as found:
        yield found


@pytest.fixture(scope="module")
def references() -> Iterator[ReferenceRunner]:
    with ReferenceRunner() as found:
        yield found


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


def instances(op: Op) -> list[Specialization]:
    """Return the small cases with every tactic: on a GPU also those differ that change only warps."""
    assert op.kernel is not None
    found = []
    for one in verification.test_specializations(op):
        if one.tactic == 0:
            tactics = range(len(op.kernel.tactics))
            found += [Specialization(op, one.type_bindings, one.attributes, one.dims, tactic) for tactic in tactics]
            found += [other for other in (one.exactly() for one in found[-len(tactics) :]) if other.multiples]
    return found


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_kernel_does_what_the_reference_says(op: Op, launcher: Launcher, references: ReferenceRunner, store: Store) -> None:
    tried = instances(op)
    compiled = compile_all(tried, [launcher.sm], store=store)
    forms: tuple[CodeFormat, ...] = ("ptx", "cubin")
    count = 0
    assert op.make_inputs is not None
    for index, instance in enumerate(tried):
        for seed, form in enumerate(forms):
            drawn = op.make_inputs(np.random.default_rng(seed), instance.dims, instance.attributes)
            given = cast_inputs(op, instance.type_bindings, drawn)
            meant = references.run(op, instance.type_bindings, instance.attributes, given)
            found = launcher.run(instance, compiled[index, launcher.sm], given, code_format=form)
            said = find_mismatch(op, instance.type_bindings, found, meant, tolerance_factor=2)
            assert said is None, f"{instance} from {form}: {said}"
            count += 1
    where = f"{detect_gpus()[0].name} (sm{launcher.sm})"
    versions = {name: version(name) for name in ("triton", "onnx", "cuda-core")}
    verification.save_check(op, verification.OpCheck(machine=where, cases=count, timestamp=utc_now(), versions=versions), store)


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_second_run_gives_the_same_bits(op: Op, launcher: Launcher, store: Store) -> None:
    """No atomics on outputs, one order of reduction."""
    instance = instances(op)[0]
    compiled = compile_all([instance], [launcher.sm], store=store)[0, launcher.sm]
    assert op.make_inputs is not None
    given = cast_inputs(
        op, instance.type_bindings, op.make_inputs(np.random.default_rng(0), instance.dims, instance.attributes)
    )
    first, *others = (launcher.run(instance, compiled, given) for _ in range(5))
    for other in others:
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes()
