"""Opset conversion: a model keeps its semantics, or is rejected with the op that would change."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import run_model

from ryzen_passes.opset import raise_opset, standard_opset

REDUCE = """
<ir_version: 8, opset_import: ["" : 13]>
g (float[4,6] x) => (float[4,1] m, float[4,3] a, float[4,3] b) {
   m = ReduceMean <axes = [1], keepdims = 1> (x)  a, b = Split <axis = 1> (x) }
"""


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("to", [18, 21, 24])
def test_ops_with_changed_syntax_are_converted(to: int) -> None:
    converted = model(REDUCE)
    assert raise_opset(converted, to) is None
    assert standard_opset(converted) == to
    after = ir.to_proto(converted)
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(0).random((4, 6), np.float32)
    for actual, expected in zip(run_model(after, {"x": x}), run_model(onnx.parser.parse_model(REDUCE), {"x": x}), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            '<ir_version: 8, opset_import: ["" : 17]> g (float[1,1,4,4] x, float[1,2,2,2] at) => (float[1,1,2,2] y) '
            "{ [look] y = GridSample (x, at) }",
            ["look", "GridSample", "20"],
        ),
        ('<ir_version: 8, opset_import: ["" : 11]> g (float[4] x) => (float[4] y) { y = Softmax (x) }', ["11", "13"]),
    ],
)
def test_an_op_with_changed_semantics_is_rejected_and_the_model_is_unchanged(text: str, names: list[str]) -> None:
    graph_model = model(text)
    before = ir.to_proto(graph_model)
    reason = raise_opset(graph_model, 23)
    assert reason is not None
    assert all(name in reason for name in names)
    assert ir.to_proto(graph_model) == before


def test_a_model_at_the_target_opset_is_unchanged() -> None:
    graph_model = model(
        REDUCE.replace('"" : 13', '"" : 24')
        .replace("axes = [1], ", "")
        .replace("Split <axis = 1>", "Split <axis = 1, num_outputs = 2>")
    )
    before = ir.to_proto(graph_model)
    assert raise_opset(graph_model, 23) is None
    assert ir.to_proto(graph_model) == before


FUNCTION_REDUCE = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[4,6] x) => (float[4,1] m, float[4,1] n) {{ m = local.reduce {call} (x)  n = local.reduce <along = [1]> (x) }}
<domain: "local", opset_import: ["" : 17]>
reduce <along> (x) => (y) {{ y = ReduceMax <axes : ints = @along, keepdims = 1> (x) }}
"""


def test_axes_that_refer_to_an_attribute_of_the_function_become_an_input() -> None:
    text = FUNCTION_REDUCE.format(call="<along = [1]>")
    converted = model(text)
    assert raise_opset(converted, 21) is None
    after = ir.to_proto(converted)
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(0).random((4, 6), np.float32)
    for actual, expected in zip(run_model(after, {"x": x}), run_model(onnx.parser.parse_model(text), {"x": x}), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_axes_that_a_call_omits_are_refused() -> None:
    graph_model = model(FUNCTION_REDUCE.format(call=""))
    before = ir.to_proto(graph_model)
    reason = raise_opset(graph_model, 21)
    assert reason is not None
    assert "omits `along`" in reason
    assert ir.to_proto(graph_model) == before


def test_the_new_inputs_of_nodes_without_names_have_different_names() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 13]>
        g (float[4,6] x) => (float[4,1] m, float[1,6] n) {
            m = ReduceMax <axes = [1]> (x)  n = ReduceMax <axes = [0]> (x) }"""
    converted = model(text)
    assert raise_opset(converted, 18) is None
    x = np.random.default_rng(0).random((4, 6), np.float32)
    for actual, expected in zip(
        run_model(converted, {"x": x}), run_model(onnx.parser.parse_model(text), {"x": x}), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
