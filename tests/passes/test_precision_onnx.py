"""The pass `precision` on every eighth of the 1,884 ONNX node cases, for each type, with and without `io`."""

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


def sampled_cases() -> tuple[Any, ...]:
    return node_cases()[::8]


UNTYPED = ("label_encoder", "adagrad", "adam", "momentum", "linear_attention", "optional_get_element")
"""Cases of ops whose output type is in an attribute without a schema description, or comes from shape inference only."""


def is_valid(model: ir.Model) -> bool:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@pytest.mark.parametrize("to", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("io", [False, True])
def test_valid_models_stay_valid(to: Any, io: bool) -> None:
    converted, invalid = 0, []
    for case in sampled_cases():
        if not is_valid(ir.from_proto(case.model)):
            continue
        model = ir.from_proto(case.model)
        change = ConvertPrecision(to=to, io=io).rewrite(model, PassContext(backend="tensorrt-rtx"))
        if isinstance(change, Refusal):
            assert to == "bf16"
            continue
        converted += 1
        if (
            not is_valid(model)
            or (to == "fp32" and TYPES_FLOAT32.check(model))
            or (change and not is_valid(emulate_half_precision(model)))
        ):
            invalid.append(case.name)
    assert not invalid
    assert converted > 150


def test_inferred_types_match_the_declared_ones() -> None:
    mismatches, compared = [], 0
    for case in sampled_cases():
        model = ir.from_proto(case.model)
        declared = {value: value.dtype for value in model.graph.outputs if isinstance(value.type, ir.TensorType)}
        for value in model.graph.outputs:
            value.type = None
        inferred = element_types(model)
        compared += len(declared)
        if any(inferred.get(value) != dtype for value, dtype in declared.items()) and not any(
            op in case.name for op in UNTYPED
        ):
            mismatches.append(case.name)
    assert not mismatches
    assert compared > 200
