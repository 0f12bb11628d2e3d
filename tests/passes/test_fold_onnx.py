"""Fold on the ONNX node cases: ONNX Runtime computes the same outputs before and after."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.fold_checks import assert_same, fold, run
from support.onnx_node_cases import node_cases

from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_passes.fold.iteration import FoldIteration
from ryzen_passes.fold.stats import FoldStats

QUICK_PREFIXES = """constantofshape clip dropout expand gelu identity if layer_normalization loop nllloss reshape concat scan
sequence_insert shape slice split squeeze unsqueeze where center_crop_pad range affine_grid""".split()
"""Name prefixes of the cases in the quick run: ops that fold rewrites, and ops that are expanded into many nodes."""


def make_feed(values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    arrays = [onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values]
    return dict(zip(names, arrays, strict=True))


def with_constant_inputs(case: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the model of `case` with its tensor inputs as initializers, and the feed for the other inputs."""
    model, feed = onnx.ModelProto(), {}
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)
    remaining = []
    for declared, value in zip(case.model.graph.input, case.data_sets[0][0], strict=True):
        tensor = value if isinstance(value, onnx.TensorProto) else None
        if tensor is None and isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            tensor = onnx.numpy_helper.from_array(np.asarray(value))
        if tensor is not None and tensor.data_type == declared.type.tensor_type.elem_type:
            model.graph.initializer.add().CopyFrom(tensor)
            model.graph.initializer[-1].name = declared.name
        else:
            remaining.append(declared)
            feed |= make_feed([value], [declared.name])
    del model.graph.input[:]
    model.graph.input.extend(remaining)
    return model, feed


def folds_equivalently(model: onnx.ModelProto, feed: dict[str, Any], *, rtol: float, atol: float) -> bool:
    """Fold `model` and compare the outputs; return False if ONNX Runtime rejects the original model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about rounding, onnx about overflowing casts
        folded, _ = fold(model)
    try:
        expected = run(model, feed)
    except Exception:  # noqa: BLE001  any exception means that ONNX Runtime rejects the original model
        return False
    assert_same(expected, run(folded, feed), rtol=rtol, atol=atol)
    return True


def count_equivalent(cases: Sequence[Any], *, constant: bool) -> int:
    compared = 0
    for case in cases:
        # The ONNX reference evaluates constants, not ONNX Runtime: outputs are equal within the tolerance of the case.
        inexact = constant or "fp16" in case.name or "bf16" in case.name
        rtol, atol = (case.rtol, max(case.atol, 1e-6)) if inexact else (0.0, 0.0)
        if constant:
            model, feed = with_constant_inputs(case)
        else:
            model = case.model
            feed = make_feed(case.data_sets[0][0], [value.name for value in model.graph.input])
        try:
            compared += folds_equivalently(model, feed, rtol=rtol, atol=atol)
        except Exception as error:
            raise AssertionError(f"{case.name}: {error}") from error
    return compared


@pytest.mark.parametrize("constant", [False, True], ids=["inputs", "constants"])
def test_a_sample_of_the_node_cases_computes_the_same(constant: bool) -> None:
    assert count_equivalent(node_cases(*QUICK_PREFIXES), constant=constant) > 150


def with_symbolic_dims(case: Any, rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the model of `case` with random input dims made symbolic and output shapes removed, and the replaced dims."""
    model, dims_by_name = onnx.ModelProto(), {}
    model.CopyFrom(case.model)
    for declared in model.graph.output:
        if declared.type.HasField("tensor_type"):
            declared.type.tensor_type.ClearField("shape")
    for declared in model.graph.input:
        for axis, dim in enumerate(declared.type.tensor_type.shape.dim):
            if rng.random() < 0.5 and dim.HasField("dim_value"):
                name = f"{declared.name}/{axis}"
                dims_by_name[name] = dim.dim_value
                dim.dim_param = name
    return model, dims_by_name


def evaluate_dim(dim: SymbolicDim, symbols: Mapping[int, int]) -> int | None:
    """Return the value of a dim; None if it has a symbol that is not in `symbols`."""
    if isinstance(dim, int):
        return dim
    if not all(symbol in symbols for product, _ in dim for symbol in product):
        return None
    return sum(factor * math.prod(symbols[symbol] for symbol in product) for product, factor in dim)


def count_matching_dims(cases: Sequence[Any]) -> int:
    """Compare inferred output dims with the expected outputs of the cases; return the number of compared dims."""
    rng, compared = np.random.default_rng(0), 0
    for case in cases:
        proto, dims_by_name = with_symbolic_dims(case, rng)
        model = ir.from_proto(proto)
        outputs, iteration = list(model.graph.outputs), FoldIteration(model, FoldStats())
        iteration.run()
        symbols = {
            dim[0][0][0]: dims_by_name[name]
            for name, dim in iteration.symbols.dims_by_name.items()
            if name in dims_by_name and not isinstance(dim, int)
        }
        for before, after, expected in zip(outputs, model.graph.outputs, case.data_sets[0][1], strict=True):
            info = iteration.lookup_info(after) if before is not after else iteration.lookup_info(before)
            if info.dims is None or not isinstance(expected, (np.ndarray, np.generic)):
                continue
            inferred = [evaluate_dim(dim, symbols) for dim in info.dims]
            pairs = [(actual, size) for actual, size in zip(inferred, expected.shape, strict=True) if actual is not None]
            assert all(actual == size for actual, size in pairs), (case.name, inferred, expected.shape)
            compared += len(pairs)
    return compared


def test_inferred_dims_match_the_outputs_of_a_sample_of_the_node_cases() -> None:
    assert count_matching_dims(node_cases(*QUICK_PREFIXES)) > 300


@pytest.mark.slow
def test_inferred_dims_match_the_outputs_of_all_node_cases() -> None:
    assert count_matching_dims(node_cases()) > 3500


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True], ids=["inputs", "constants"])
def test_all_node_cases_compute_the_same(constant: bool) -> None:
    assert len(node_cases()) >= 1500
    assert count_equivalent(node_cases(), constant=constant) > 1200
