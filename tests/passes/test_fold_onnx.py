"""Fold on ONNX's own node tests: whatever ONNX Runtime computed of a model before, it computes afterwards."""

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
from ryzen_passes.fold.fold_pass import FoldPass
from ryzen_passes.fold.stats import FoldStats

SAMPLE = """constantofshape clip dropout expand gelu identity if layer_normalization loop nllloss reshape concat scan
sequence_insert shape slice split squeeze unsqueeze where center_crop_pad range affine_grid""".split()
"""What the tests begin with that the quick run takes: what fold rewrites, and what comes expanded into many nodes."""


def fed(values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    arrays = [onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values]
    return dict(zip(names, arrays, strict=True))


def with_constant_inputs(test: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the model of `test` with its tensor inputs as initializers, and what is left to feed."""
    model, feed = onnx.ModelProto(), {}
    model.CopyFrom(test.model)
    model.ir_version = max(model.ir_version, 4)
    left = []
    for declared, value in zip(test.model.graph.input, test.data_sets[0][0], strict=True):
        tensor = value if isinstance(value, onnx.TensorProto) else None
        if tensor is None and isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            tensor = onnx.numpy_helper.from_array(np.asarray(value))
        if tensor is not None and tensor.data_type == declared.type.tensor_type.elem_type:
            model.graph.initializer.add().CopyFrom(tensor)
            model.graph.initializer[-1].name = declared.name
        else:
            left.append(declared)
            feed |= fed([value], [declared.name])
    del model.graph.input[:]
    model.graph.input.extend(left)
    return model, feed


def check(model: onnx.ModelProto, feed: dict[str, Any], *, rtol: float, atol: float) -> bool:
    """Fold `model` and compare; return whether ONNX Runtime took it in the first place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy says that it rounds, onnx that a cast overflows
        folded, _ = fold(model)
    try:
        expected = run(model, feed)
    except Exception:  # noqa: BLE001  whatever it raises, it refuses the model as it was
        return False
    assert_same(expected, run(folded, feed), rtol=rtol, atol=atol)
    return True


def compare(tests: Sequence[Any], *, constant: bool) -> int:
    compared = 0
    for test in tests:
        # Constants are computed by ONNX's reference rather than by ONNX Runtime: equal within the test's own tolerance.
        rounds = constant or "fp16" in test.name or "bf16" in test.name
        rtol, atol = (test.rtol, max(test.atol, 1e-6)) if rounds else (0.0, 0.0)
        if constant:
            model, feed = with_constant_inputs(test)
        else:
            model = test.model
            feed = fed(test.data_sets[0][0], [value.name for value in model.graph.input])
        try:
            compared += check(model, feed, rtol=rtol, atol=atol)
        except Exception as error:
            raise AssertionError(f"{test.name}: {error}") from error
    return compared


@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_a_sample_of_the_node_tests_computes_the_same(constant: bool) -> None:
    assert compare(node_cases(*SAMPLE), constant=constant) > 150


def with_symbolic_sizes(test: Any, random: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the model of `test` with some sizes of its inputs as names and none of its outputs declared; and those sizes."""
    model, sizes = onnx.ModelProto(), {}
    model.CopyFrom(test.model)
    for declared in model.graph.output:
        if declared.type.HasField("tensor_type"):
            declared.type.tensor_type.ClearField("shape")
    for declared in model.graph.input:
        for at, dim in enumerate(declared.type.tensor_type.shape.dim):
            if random.random() < 0.5 and dim.HasField("dim_value"):
                name = f"{declared.name}/{at}"
                sizes[name] = dim.dim_value
                dim.dim_param = name
    return model, sizes


def evaluated(dim: SymbolicDim, symbols: Mapping[int, int]) -> int | None:
    """Return the value of a size; None where it has symbols of which none is known."""
    if isinstance(dim, int):
        return dim
    if not all(symbol in symbols for product, _ in dim for symbol in product):
        return None
    return sum(factor * math.prod(symbols[symbol] for symbol in product) for product, factor in dim)


def check_sizes(tests: Sequence[Any]) -> int:
    """Compare what is known before the model runs with what ONNX's tests say comes out; return how many sizes were compared."""
    random, compared = np.random.default_rng(0), 0
    for test in tests:
        proto, sizes = with_symbolic_sizes(test, random)
        model = ir.from_proto(proto)
        outputs, walk = list(model.graph.outputs), FoldPass(model, FoldStats())
        walk.run()
        symbols = {
            dim[0][0][0]: sizes[name]
            for name, dim in walk.symbols.dims_by_name.items()
            if name in sizes and not isinstance(dim, int)
        }
        for before, after, expected in zip(outputs, model.graph.outputs, test.data_sets[0][1], strict=True):
            known = walk.lookup_info(after) if before is not after else walk.lookup_info(before)
            if known.dims is None or not isinstance(expected, (np.ndarray, np.generic)):
                continue
            found = [evaluated(dim, symbols) for dim in known.dims]
            pairs = [(one, size) for one, size in zip(found, expected.shape, strict=True) if one is not None]
            assert all(one == size for one, size in pairs), (test.name, found, expected.shape)
            compared += len(pairs)
    return compared


def test_the_sizes_that_are_known_beforehand_are_those_that_come_out() -> None:
    assert check_sizes(node_cases(*SAMPLE)) > 300


@pytest.mark.slow
def test_the_sizes_that_are_known_beforehand_of_all_node_tests_are_those_that_come_out() -> None:
    assert check_sizes(node_cases()) > 3500


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_all_node_tests_compute_the_same(constant: bool) -> None:
    assert len(node_cases()) >= 1500
    assert compare(node_cases(), constant=constant) > 1200
