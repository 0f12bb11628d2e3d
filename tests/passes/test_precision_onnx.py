"""The pass precision on ONNX's own node tests: every eighth of 1884 models, in each type, with and without its border."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from support.onnx_node_cases import node_cases

from ryzen_compile.ir.analysis.element_types import element_types
from ryzen_compile.numerics.half_emulation import emulate_half_precision
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.precision import ConvertPrecision
from ryzen_passes.properties import TYPES_FLOAT32

pytestmark = pytest.mark.slow

CASES = node_cases()[::8]

UNTYPED = ("label_encoder", "adagrad", "adam", "momentum", "linear_attention", "optional_get_element")
"""Tests of ops whose types are in attributes that no schema describes, or are left to shape inference."""


def is_valid(model: ir.Model) -> bool:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@pytest.mark.parametrize("to", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("io", [False, True])
def test_valid_models_stay_valid(to: Any, io: bool) -> None:
    tried, broken = 0, []
    for case in CASES:
        if not is_valid(ir.from_proto(case.model)):
            continue
        model = ir.from_proto(case.model)
        change = ConvertPrecision(to=to, io=io).rewrite(model, PassContext(backend="tensorrt-rtx"))
        if isinstance(change, Refusal):
            assert to == "bf16"
            continue
        tried += 1
        if (
            not is_valid(model)
            or (to == "fp32" and TYPES_FLOAT32.check(model))
            or (change and not is_valid(emulate_half_precision(model)))
        ):
            broken.append(case.name)
    assert not broken
    assert tried > 150


def test_inferred_types_are_the_declared_ones() -> None:
    wrong, compared = [], 0
    for case in CASES:
        model = ir.from_proto(case.model)
        declared = {value: value.dtype for value in model.graph.outputs if isinstance(value.type, ir.TensorType)}
        for value in model.graph.outputs:
            value.type = None
        found = element_types(model)
        compared += len(declared)
        if any(found.get(value) != dtype for value, dtype in declared.items()) and not any(
            word in case.name for word in UNTYPED
        ):
            wrong.append(case.name)
    assert not wrong
    assert compared > 200
