"""A sample of ONNX's own node tests through the whole tool; `make conformance` runs all of them."""

from __future__ import annotations

import warnings

import conformance
import pytest
from support.onnx_node_cases import node_cases

from ryzen_compile.backends.process.worker import start_worker


@pytest.mark.slow
@pytest.mark.parametrize("count", [26, pytest.param(52, marks=pytest.mark.exhaustive)])
def test_a_sample_of_onnx_node_tests_passes_as_without_the_tool(count: int) -> None:
    with start_worker("tensorrt-rtx") as raw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tests compute infinities intentionally
        outcomes = [conformance.run_case(case, raw) for case in node_cases()[:: len(node_cases()) // count]]
    assert conformance.missed_bounds(outcomes) == {}
    assert len(node_cases()) >= 1500
    assert sum(outcome.plain == "pass" for outcome in outcomes) > count / 2
    assert sum(outcome.raw == "built" for outcome in outcomes) > count / 4
    assert any(outcome.sm89.startswith("refused: ") for outcome in outcomes)


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"cpu": "differs: output 0 differs"}, "passed by plain ONNX Runtime, lost through the package"),
        ({"sm89": "broken"}, "broken"),
        ({"leftover_files": [".model.ryzen.part"]}, "left something behind"),
        ({"sm89": "refused: "}, "refused without a reason"),
        ({"sm89": "refused: no kernel"}, "fewer engines than the raw builder makes"),
    ],
)
def test_each_bound_can_be_violated(change: dict[str, object], bound: str) -> None:
    fields = {
        "name": "t",
        "plain": "pass",
        "raw": "built",
        "cpu": "pass",
        "sm89": "built",
        "leftover_files": [],
        "seconds": 0.1,
    }
    assert conformance.missed_bounds([conformance.ConformanceResult(**fields)]) == {}
    assert bound in conformance.missed_bounds([conformance.ConformanceResult(**fields | change)])
