"""A sample of ONNX's own node tests through the whole tool; `make conformance` takes all of them."""

from __future__ import annotations

import warnings

import conformance
import pytest
from support.onnx_node_cases import node_cases

from ryzen_compile.backends.process.worker import start_worker

EVERY = 36


@pytest.mark.slow
def test_a_sample_of_onnx_node_tests_passes_as_it_does_without_the_tool() -> None:
    with start_worker("tensorrt-rtx") as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests compute infinities on purpose
        outcomes = [conformance.run_case(case, raw) for case in node_cases()[::EVERY]]
    assert conformance.missed_bounds(outcomes) == {}
    assert len(outcomes) > 50
    assert sum(one.plain == "pass" for one in outcomes) > 30
    assert sum(one.raw == "built" for one in outcomes) > 15
    assert any(one.sm89.startswith("refused: ") for one in outcomes)


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"cpu": "differs: output 0 differs"}, "passed by plain ONNX Runtime, lost through the package"),
        ({"sm89": "broken"}, "broken"),
        ({"left": [".model.ryzen.part"]}, "left something behind"),
        ({"sm89": "refused: "}, "refused without a reason"),
        ({"sm89": "refused: no kernel"}, "fewer engines than the raw builder makes"),
    ],
)
def test_each_bound_can_be_missed(change: dict[str, object], bound: str) -> None:
    words = {"name": "t", "plain": "pass", "raw": "built", "cpu": "pass", "sm89": "built", "left": [], "seconds": 0.1}
    assert conformance.missed_bounds([conformance.ConformanceResult(**words)]) == {}
    assert bound in conformance.missed_bounds([conformance.ConformanceResult(**words | change)])
