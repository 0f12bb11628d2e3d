"""The baselines that kernels are timed against compute what the references mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kernels
import kernels_torch
import numpy as np
import pytest
import torch

from ryzen_compile import registry
from ryzen_compile.ops import verification
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch

_ROOM = 1e-4
"""How far plain torch may be from a reference, over its tolerance: it sums in another order."""


@pytest.fixture(scope="module")
def references() -> Iterator[ReferenceRunner]:
    with ReferenceRunner() as found:
        yield found


def test_every_op_with_a_kernel_has_a_baseline() -> None:
    ours = {name for name, op in registry.ops().items() if op.domain == "ryzen" and op.kernel is not None}
    assert {*kernels_torch.TORCH_REFERENCES} == ours


def tame(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs whose scores do not tie and are finite: what plain torch gives no word on."""
    random = np.random.default_rng(1)
    for name in ("score", "new_score", "similarity", "metric"):
        if name in inputs:
            inputs[name] = random.normal(size=inputs[name].shape)
    return {name: np.nan_to_num(a, posinf=1, neginf=-1) if a.dtype.kind == "f" else a for name, a in inputs.items()}


@pytest.mark.parametrize("name", kernels_torch.TORCH_REFERENCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_baseline_computes_what_the_reference_means(name: str, seed: int, references: ReferenceRunner) -> None:
    op = registry.find_op(name)
    assert op.make_inputs is not None
    for case in op.test_cases:
        attributes, sizes = verification.split_case(op, case)
        elements = {variable: kinds[0] for variable, kinds in op.type_constraints.items()}
        drawn = tame(dict(op.make_inputs(np.random.default_rng(seed), sizes, attributes)))
        given = cast_inputs(op, elements, drawn)
        meant = references.run(op, elements, attributes, given)
        found = kernels_torch.TORCH_REFERENCES[name](kernels_torch.to_device(given, "cpu"), attributes)
        arrays = {key: value.contiguous().view(torch.uint8).numpy().view(meant[key].dtype) if value.dtype == torch.bfloat16
                  else value.numpy() for key, value in found.items()}  # fmt: skip
        assert find_mismatch(op, elements, arrays, meant, tolerance_factor=1) is None or _close(arrays, meant)


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.allclose(one[name], other[name], rtol=_ROOM, atol=_ROOM) for name in other)


def test_caches_are_full_when_they_are_timed() -> None:
    op = registry.find_op("KVAppendEvict")
    assert op.make_inputs is not None
    attributes, sizes = verification.split_case(op, op.test_cases[1])
    full = kernels.fill_caches(op.make_inputs(np.random.default_rng(0), sizes, attributes))
    assert (np.sort(full["position"]) == np.arange(sizes["C"])).all()
    assert (full["new_position"] == sizes["C"] + np.arange(sizes["S"])).all()


@pytest.mark.parametrize("name", ["KVAppendEvict", "VectorQuantizeInt8", "TokenMatch"])
def test_a_reference_is_timed_with_its_tensors_bound(name: str) -> None:
    op = registry.find_op(name)
    attributes, sizes = verification.split_case(op, op.test_cases[0])
    assert op.make_inputs is not None
    elements = dict.fromkeys(op.type_variables, "float16")
    given = cast_inputs(op, elements, op.make_inputs(np.random.default_rng(0), sizes, attributes))
    assert kernels.time_onnxruntime(op, elements, attributes, given, device="cpu", rounds=2) > 0
