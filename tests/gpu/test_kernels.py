"""Kernels on a GPU: what is compiled ahead of time, launched with TensorRT's argument list, does what the references say."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.kernels import compile_all
from ryzen_compile.kernels.driver import Form, Launcher
from ryzen_compile.kernels.specialization import Instance
from ryzen_compile.ops import verification
from ryzen_compile.ops.equivalence import References, disagreement, rounded
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.target import detect
from ryzen_compile.utils.record import utc_now

pytestmark = pytest.mark.gpu
OPS = [op for op in registry.ops().values() if op.kernel is not None]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as found:
        yield found


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    with References() as found:
        yield found


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


def instances(op: Op) -> list[Instance]:
    """Return the small cases with every tactic: on a GPU also those differ that change only warps."""
    assert op.kernel is not None
    found = []
    for one in verification.small(op):
        if one.tactic == 0:
            tactics = range(len(op.kernel.tactics))
            found += [Instance(op, one.elements, one.attributes, one.dims, tactic) for tactic in tactics]
            found += [other for other in (one.exactly() for one in found[-len(tactics) :]) if other.multiples]
    return found


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_kernel_does_what_the_reference_says(op: Op, launcher: Launcher, references: References, store: Store) -> None:
    tried = instances(op)
    compiled = compile_all(tried, [launcher.sm], store=store)
    forms: tuple[Form, ...] = ("ptx", "cubin")
    count = 0
    assert op.draw is not None
    for index, instance in enumerate(tried):
        for seed, form in enumerate(forms):
            drawn = op.draw(np.random.default_rng(seed), instance.dims, instance.attributes)
            given = rounded(op, instance.elements, drawn)
            meant = references.run(op, instance.elements, instance.attributes, given)
            found = launcher.run(instance, compiled[index, launcher.sm], given, form=form)
            said = disagreement(op, instance.elements, found, meant, slack=2)
            assert said is None, f"{instance} from {form}: {said}"
            count += 1
    where = f"{detect()[0].name} (sm{launcher.sm})"
    versions = {name: version(name) for name in ("triton", "onnx", "cuda-core")}
    verification.remember(op, verification.Check(where=where, cases=count, made_at=utc_now(), versions=versions), store)


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_second_run_gives_the_same_bits(op: Op, launcher: Launcher, store: Store) -> None:
    """No atomics on outputs, one order of reduction."""
    instance = instances(op)[0]
    compiled = compile_all([instance], [launcher.sm], store=store)[0, launcher.sm]
    assert op.draw is not None
    given = rounded(op, instance.elements, op.draw(np.random.default_rng(0), instance.dims, instance.attributes))
    first, *others = (launcher.run(instance, compiled, given) for _ in range(5))
    for other in others:
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes()
