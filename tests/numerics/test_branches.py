"""Branches in a comparison: cases reach both values of a bool and edge values of an integer; what no case ran is named."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from support.stage_counts import StageCounts

from ryzen_compile import api
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.numerics.comparison import Comparison, compare, comparison_diagnostics
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.progress import Progress
from ryzen_compile.report import text as report

GRAPH = """<ir_version: 10, opset_import: ["" : 21]> g (bool flag, int64 n, float[B, 4] x) => (float[B, 4] y) {{
    two = Constant <value = float {{2}}> ()  five = Constant <value = int64 {{5}}> ()  yes = Constant <value = bool {{1}}> ()
    many = Greater (n, five)
    a = If (flag) <
        then_branch = t () => (float[B, 4] a1) {{ a1 = {0} (x, two) }},
        else_branch = e () => (float[B, 4] a2) {{ a2 = If (many) <
            then_branch = t2 () => (float[B, 4] a3) {{ a3 = {1} (x, two) }},
            else_branch = e2 () => (float[B, 4] a4) {{ a4 = {2} (x, two) }}> }}>
    y = Loop (n, yes, a) <body = b (int64 i, bool go, float[B, 4] v) => (bool on, float[B, 4] w) {{
        on = Identity (go)  w = {3} (v, two) }}>
}}"""
OPS = ("Add", "Mul", "Sub", "Div")


def write(folder: Path, name: str, ops: tuple[str, ...] = OPS) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH.format(*ops)), path)
    return path


def compare_files(
    candidate: Path, baseline: Path, source: CaseSource | None = None, progress: Progress | None = None
) -> Comparison:
    own, other = onnx_candidate(candidate), onnx_candidate(baseline)
    return compare(own, other, criteria=default_criteria(), case_source=source, progress=progress)


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("seed", range(2))
def test_a_wrong_branch_or_body_is_found_whatever_is_drawn(wrong: int, seed: int, tmp_path: Path) -> None:
    ops = tuple("Max" if index == wrong else op for index, op in enumerate(OPS))
    result = compare_files(write(tmp_path, "wrong", ops), write(tmp_path, "right"), CaseSource(seed=seed))
    assert not result.met


def test_the_same_branches_meet_the_criteria_and_all_of_them_run(tmp_path: Path) -> None:
    path = write(tmp_path, "right")
    result = compare_files(path, path)
    assert result.met
    assert result.accuracy.not_run == ()
    added = [case.partition("flag=")[2] for case in result.cases if "flag=" in case]
    assert added == [f"{flag}, n={n}" for flag in (False, True) for n in (0, 1, 3, 4, 5, 6)]


def test_branches_that_no_case_ran_are_named_and_not_compared(tmp_path: Path) -> None:
    path = write(tmp_path, "right")
    inputs = {"flag": np.array(True), "n": np.array(0), "x": np.ones((1, 4), np.float32)}
    result = compare_files(path, path, CaseSource(inputs=[inputs]))
    expected = ("else branch of the If of `a`", "body of the Loop of `y`")
    assert result.met
    assert result.accuracy.not_run == expected, "the branches inside of the else branch are not named too"
    assert [diagnostic.code for diagnostic in comparison_diagnostics([result])] == ["branch-not-run"] * 2
    lines = report.format_comparison(result).splitlines()
    assert [line for line in lines if line.startswith("not compared: ")] == [
        f"not compared: {branch}: no case ran it" for branch in expected
    ]
    assert msgspec.json.decode(msgspec.json.encode(result))["accuracy"]["not_run"] == list(expected)


def test_a_value_that_the_baseline_does_not_run_is_not_compared(tmp_path: Path) -> None:
    """A concatenation of the outputs of no iterations fails."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (int64 n, float[B, 4] x) => (float[B, 4] y) {
        yes = Constant <value = bool {1}> ()  first = Constant <value = int64 {0}> ()
        r = Loop (n, yes) <body = b (int64 i, bool go) => (bool on, float[B, 4] w) { on = Identity (go)  w = Neg (x) }>
        y = Gather <axis = 0> (r, first)
    }"""
    path = tmp_path / "stack.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    samples = [{"n": np.array(2), "x": np.ones((1, 4), np.float32)}]
    progress = StageCounts()
    result = compare_files(path, path, CaseSource(samples=samples), progress)
    assert result.met
    count = len(result.cases)
    assert progress.texts() == [f"{title}: {count} of {count} cases" for title in ("run the baseline", "compare")]
    assert {case.rpartition("n=")[2] for case in result.cases if "n=" in case} == {"1", "3"}


def test_a_package_records_the_branches_that_no_case_ran(tmp_path: Path) -> None:
    """The condition depends on the sign of a sum, which random values within the declared range do not change."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (uint8[B, 4] x) => (float[B, 4] y) {
        f = Cast <to = 1> (x)  s = ReduceSum <keepdims = 0> (f)  zero = Constant <value = float {0}> ()  b = Less (s, zero)
        y = If (b) <then_branch = t () => (float[B, 4] p) { p = Neg (f) },
            else_branch = e () => (float[B, 4] q) { q = Exp (f) }>
    }"""
    path = tmp_path / "signs.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    api.build(path, tmp_path / "signs.ryzen", gpu="cpu", cache=False)
    package = read_package(tmp_path / "signs.ryzen")
    [variant, *_] = package.manifest.graphs[0].variants
    assert variant.accuracy[0].not_run == ("then branch of the If of `y`",)
    assert "not compared: then branch of the If of `y`: no case ran it" in report.format_package(package)
