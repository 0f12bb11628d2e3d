"""The PyTorch baselines of the kernel benchmark compute the same as the reference implementations."""

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

_TOLERANCE = 1e-4
"""The allowed relative and absolute difference of PyTorch from a reference: PyTorch sums in another order."""


@pytest.fixture(scope="module")
def references() -> Iterator[ReferenceRunner]:
    with ReferenceRunner() as runner:
        yield runner


def test_every_op_with_a_kernel_has_a_baseline() -> None:
    names = {name for name, op in registry.ops().items() if op.domain == "ryzen" and op.kernel is not None}
    assert {*kernels_torch.TORCH_REFERENCES} == names


def without_ties(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with finite scores without ties; the PyTorch baselines do not define the other cases."""
    random = np.random.default_rng(1)
    for name in ("score", "new_score", "similarity", "metric"):
        if name in inputs:
            inputs[name] = random.normal(size=inputs[name].shape)
    return {
        name: np.nan_to_num(array, posinf=1, neginf=-1) if array.dtype.kind == "f" else array for name, array in inputs.items()
    }


@pytest.mark.parametrize("name", kernels_torch.TORCH_REFERENCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_baseline_computes_the_same_as_the_reference(name: str, seed: int, references: ReferenceRunner) -> None:
    op = registry.find_op(name)
    assert op.make_inputs is not None
    for case in op.test_cases:
        attributes, sizes = verification.split_case(op, case)
        dtypes = {variable: allowed[0] for variable, allowed in op.type_constraints.items()}
        random_inputs = without_ties(dict(op.make_inputs(np.random.default_rng(seed), sizes, attributes)))
        inputs = cast_inputs(op, dtypes, random_inputs)
        expected = references.run(op, dtypes, attributes, inputs)
        outputs = kernels_torch.TORCH_REFERENCES[name](kernels_torch.to_device(inputs, "cpu"), attributes)
        arrays = {
            key: value.contiguous().view(torch.uint8).numpy().view(expected[key].dtype)
            if value.dtype == torch.bfloat16
            else value.numpy()
            for key, value in outputs.items()
        }
        assert find_mismatch(op, dtypes, arrays, expected, tolerance_factor=1) is None or _is_close(arrays, expected)


def _is_close(arrays: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.allclose(arrays[name], expected[name], rtol=_TOLERANCE, atol=_TOLERANCE) for name in expected)


def test_caches_are_timed_when_full() -> None:
    op = registry.find_op("KVAppendEvict")
    assert op.make_inputs is not None
    attributes, sizes = verification.split_case(op, op.test_cases[1])
    inputs = kernels.fill_caches(op.make_inputs(np.random.default_rng(0), sizes, attributes))
    assert (np.sort(inputs["position"]) == np.arange(sizes["C"])).all()
    assert (inputs["new_position"] == sizes["C"] + np.arange(sizes["S"])).all()


@pytest.mark.parametrize("name", ["KVAppendEvict", "VectorQuantizeInt8", "TokenMatch"])
def test_a_reference_is_timed_with_bound_tensors(name: str) -> None:
    op = registry.find_op(name)
    attributes, sizes = verification.split_case(op, op.test_cases[0])
    assert op.make_inputs is not None
    dtypes = dict.fromkeys(op.type_variables, "float16")
    inputs = cast_inputs(op, dtypes, op.make_inputs(np.random.default_rng(0), sizes, attributes))
    assert kernels.time_onnxruntime(op, dtypes, attributes, inputs, device="cpu", rounds=2) > 0
