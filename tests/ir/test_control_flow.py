"""Tests of control flow: the values to try for inputs that determine what runs, and which branches and bodies run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import open_session

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.control_flow import combinations_of, find_branches, find_control_values, has_control_flow
from ryzen_compile.ir.edit.branch_coverage import COVERAGE_OUTPUT, branch_coverage_graph
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.save import save

IF = (
    "If ({condition}) <then_branch = t () => (float[N] a) {{ a = Neg (x) }},"
    " else_branch = e () => (float[N] b) {{ b = Abs (x) }}>"
)
LOOP = (
    "Loop ({trips}, {go}, x) <body = l (int64 i, bool go, float[N] v) => (bool on, float[N] w)"
    " {{ on = Identity (go)  w = Neg (v) }}>"
)
CONSTANTS = (
    "yes = Constant <value = bool {1}> ()  five = Constant <value = int64 {5}> ()  two = Constant <value = int64 {2}> ()"
)


def parse(signature: str, body: str, functions: str = "") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g ({signature}, float[N] x) => (float[N] y) {{ {CONSTANTS} {body} }} {functions}"""
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [
        ("bool c", "y = " + IF.format(condition="c"), {"c": (0, 1)}),
        ("bool[1] c", "s = Squeeze (c)  n = Not (s)  y = " + IF.format(condition="n"), {"c": (0, 1)}),
        ("int64 n", "b = Greater (n, five)  y = " + IF.format(condition="b"), {"n": (0, 1, 4, 5, 6)}),
        ("int64 n", "b = Equal (five, n)  y = " + IF.format(condition="b"), {"n": (0, 1, 4, 5, 6)}),
        ("int64 n", "y = " + LOOP.format(trips="n", go="yes"), {"n": (0, 1, 3)}),
        ("bool c", "y = " + LOOP.format(trips="two", go="c"), {"c": (0, 1)}),
        (
            "int64 n",
            "y = Loop (two, yes, x) <body = l (int64 i, bool go, float[N] v) => (bool on, float[N] w)"
            " { on = Less (i, n)  w = Neg (v) }>",
            {"n": (0, 1)},
        ),
        (
            "bool c, bool d",
            "y = If (c) <then_branch = t () => (float[N] a) { a = " + IF.format(condition="d") + " },"
            " else_branch = e () => (float[N] b) { b = Abs (x) }>",
            {"c": (0, 1), "d": (0, 1)},
        ),
        ("bool c", "z = Cast <to = 1> (c)  y = Mul (x, z)", {}),
        ("float c", "b = Cast <to = 9> (c)  y = " + IF.format(condition="b"), {}),
        ("int64[K] n", "s = Size (n)  b = Greater (s, five)  y = " + IF.format(condition="b"), {}),
    ],
)
def test_inputs_that_determine_what_runs_have_values_to_try(
    signature: str, body: str, expected: dict[str, tuple[int, ...]]
) -> None:
    model = parse(signature, body)
    assert find_control_values(model, interface_of(model)) == expected
    assert has_control_flow(model) is ("If" in body or "Loop" in body)


def test_values_to_try_are_within_the_range_of_the_input() -> None:
    model = parse("int64 n", "b = Greater (n, five)  y = " + IF.format(condition="b"))
    interface = interface_of(model)
    for low, high, expected in ((2, 5, (2, 4, 5)), (5, 9, (5, 6, 9)), (0, 10**6, (0, 1, 4, 5, 6))):
        spec = msgspec.structs.replace(interface.inputs[0], low=low, high=high)
        ranged = msgspec.structs.replace(interface, inputs=(spec, *interface.inputs[1:]))
        assert find_control_values(model, ranged) == {"n": expected}


def test_values_to_try_are_representable_in_the_type_of_the_input() -> None:
    body = "limit = Constant <value = uint8 {255}> ()  b = Less (limit, n)  y = " + IF.format(condition="b")
    model = parse("uint8 n", body)
    assert find_control_values(model, interface_of(model)) == {"n": (0, 1, 254, 255)}


def test_trip_counts_to_try_are_small() -> None:
    model = parse(
        "int64 n, int64 m",
        "big = Constant <value = int64 {50000}> ()  b = Greater (n, big)  d = Greater (m, big)  k = And (b, d)  z = "
        + IF.format(condition="k")
        + "  a = Identity (z)  y = "
        + LOOP.format(trips="n", go="yes"),
    )
    assert find_control_values(model, interface_of(model)) == {"m": (0, 1, 49999, 50000, 50001), "n": (0, 1, 3)}


def test_without_loops_only_inputs_that_determine_a_branch_have_values() -> None:
    model = parse("int64 n, bool c", "z = " + IF.format(condition="c") + "  y = " + LOOP.format(trips="n", go="yes"))
    interface = interface_of(model)
    assert find_control_values(model, interface) == {"c": (0, 1), "n": (0, 1, 3)}
    assert find_control_values(model, interface, loops=False) == {"c": (0, 1)}


def test_an_input_without_small_values_does_not_keep_the_others_from_being_tried() -> None:
    model = parse("bool c, int64 n", "b = Greater (n, five)  k = And (b, c)  y = " + IF.format(condition="k"))
    interface = interface_of(model)
    large = msgspec.structs.replace(interface.inputs[1], low=2_000_000, high=3_000_000)
    ranged = msgspec.structs.replace(interface, inputs=(interface.inputs[0], large, *interface.inputs[2:]))
    assert combinations_of(find_control_values(model, ranged)) == [{"c": 0}, {"c": 1}]


@pytest.mark.parametrize(
    ("values", "count"),
    [({}, 0), ({"a": (0, 1), "b": (0, 1, 2)}, 6), ({"a": (0, 1), "b": tuple(range(9))}, 9), ({"a": tuple(range(40))}, 16)],
)
def test_combinations_contain_every_value_as_far_as_they_suffice(values: dict[str, tuple[int, ...]], count: int) -> None:
    combinations = combinations_of(values)
    assert len(combinations) == count
    assert len({tuple(combination.items()) for combination in combinations}) == count
    for name, found in values.items():
        assert {combination[name] for combination in combinations} == set(found[:count])


NESTED = """
    b = Greater (n, five)
    a = If (c) <then_branch = t () => (float[N] a1) { a1 = Neg (x) },
        else_branch = e () => (float[N] a2) { z = Neg (x)  a2 = If (b) <
            then_branch = t2 () => (float[N] a3) { a3 = Abs (z) }, else_branch = e2 () => (float[N] a4) { a4 = Neg (z) }> }>
    y, r = Loop (n, yes, a) <body = l (int64 i, bool go, float[N] v) => (bool on, float[N] w, int64 row) {
        on = Identity (go)  k = Equal (i, two)  row = Identity (i)
        w = If (k) <then_branch = t3 () => (float[N] a5) { a5 = Neg (v) },
            else_branch = e3 () => (float[N] a6) { a6 = Abs (v) }> }>
"""
DESCRIPTIONS = {
    "t": "then branch of the If of `a`",
    "e": "else branch of the If of `a`",
    "t2": "then branch of the If of `a2`",
    "e2": "else branch of the If of `a2`",
    "l": "body of the Loop of `y`",
    "t3": "then branch of the If of `w`",
    "e3": "else branch of the If of `w`",
}


def run_coverage(model: ir.Model, tmp_path: Path, **inputs: Any) -> set[str]:
    """Return the descriptions of the branches that run."""
    graph, branches = branch_coverage_graph(model)
    file = tmp_path / "coverage.onnx"
    save(graph, file)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = open_session(file)
    assert [output.name for output in session.get_outputs()] == [COVERAGE_OUTPUT]
    [ran] = session.run(None, {"x": np.ones(2, np.float32), **{name: np.array(value) for name, value in inputs.items()}})
    return {branch.description for branch, has_run in zip(branches, ran, strict=True) if has_run}


@pytest.mark.parametrize(
    ("c", "n", "ran"),
    [
        (True, 0, ["t"]),
        (False, 0, ["e", "e2"]),
        (False, 2, ["e", "e2", "l", "e3"]),
        (False, 6, ["e", "t2", "l", "e3", "t3"]),
        (True, 3, ["t", "l", "e3", "t3"]),
    ],
)
def test_the_coverage_graph_states_which_branches_and_bodies_run(c: bool, n: int, ran: list[str], tmp_path: Path) -> None:
    model = parse("bool c, int64 n", NESTED)
    before = ir.serde.serialize_model(model).SerializeToString()
    assert [branch.description for branch in find_branches(model)] == list(DESCRIPTIONS.values())
    assert run_coverage(model, tmp_path, c=c, n=n) == {DESCRIPTIONS[name] for name in ran}
    assert ir.serde.serialize_model(model).SerializeToString() == before, "the model itself is unchanged"


def test_the_body_of_a_scan_runs(tmp_path: Path) -> None:
    body = """zero = Constant <value = float {0}> ()
        s, y = Scan <num_scan_inputs = 1, body = b (float p, float e) => (float q, float o) { q = Add (p, e)  o = Neg (e) }>
            (zero, r)"""
    ran = run_coverage(parse("float[R] r", body), tmp_path, r=np.ones(3, np.float32))
    assert ran == {"body of the Scan of `s`"}


def test_branches_inside_of_functions_are_covered(tmp_path: Path) -> None:
    functions = """<domain: "local", opset_import: ["" : 21]> route (c, x) => (y) { y = """ + IF.format(condition="c") + " }"
    model = parse("bool c", "y = local.route (c, x)", functions)
    [ran] = run_coverage(model, tmp_path, c=True)
    assert ran.startswith("then branch of")


def test_the_coverage_graph_contains_only_what_the_conditions_depend_on() -> None:
    model = parse("bool c", "z = Exp (x)  v = Sin (z)  w = " + IF.format(condition="c") + "  y = Add (v, w)")
    graph, _ = branch_coverage_graph(model)
    ops = {node.op_type for graph_ in (graph.graph, *graph.graph.subgraphs()) for node in graph_}
    assert ops == {"Constant", "If", "Or"}


def test_old_opsets_are_refused() -> None:
    model = parse("bool c", "y = " + IF.format(condition="c"))
    model.graph.opset_imports[""] = 8
    with pytest.raises(ModelError, match="the opset of the model is 8, expected at least 9"):
        branch_coverage_graph(model)
