"""Rewrite rules: patterns bind nodes and tensors, and a failed match names its reason and node."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, PatternNotMatched, RewriteRule, RuleSet

MODEL = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
g (float[2,3] a, float[2,3] b) => (float[2,3] y) {{ {body} }}"""


def last_node(body: str) -> ir.Node:
    return list(ir.from_proto(onnx.parser.parse_model(MODEL.format(body=body))).graph)[-1]


def test_a_pattern_binds_tensors_and_inner_nodes() -> None:
    node = last_node("[one] t = Transpose (a)  [two] y = Transpose (t)")
    match = NodePattern("Transpose|Identity", (NodePattern("Transpose", ("x",), name="inner"),)).match(node)
    assert isinstance(match, Match)
    assert match.node is node
    assert match.nodes["inner"].name == "one"
    assert match["x"].name == "a"
    assert match.get("more") is None


@pytest.mark.parametrize(
    ("pattern", "body", "reason"),
    [
        (NodePattern("Add", ("x", "x")), "[sum] y = Add (a, b)", "has different tensors for `x`"),
        (NodePattern("Add", ("x",)), "[sum] y = Add (a, b)", "has more than 1 inputs"),
        (NodePattern("Clip", ("x", "low", "high?")), "[sum] y = Clip (a)", "has no input 1 (`low`)"),
        (
            NodePattern("Add", (NodePattern("Relu|Abs", ("x",)), "b")),
            "[sum] y = Add (a, b)",
            "input 0 is not the output of Relu or Abs",
        ),
        (
            NodePattern("Add", (NodePattern("Relu", ("x",)), "b")),
            "r = other.Relu (a)  [sum] y = Add (r, b)",
            "input 0 is not the output of Relu",
        ),
    ],
)
def test_a_failed_match_names_its_reason_and_node(pattern: NodePattern, body: str, reason: str) -> None:
    failure = pattern.match(last_node(body))
    assert isinstance(failure, MatchFailure)
    assert failure.description == f"{reason} (`sum`)"
    assert failure.to_refusal().location == "sum"


def test_omitted_and_further_inputs() -> None:
    node = last_node("y = Clip (a)")
    assert isinstance(NodePattern("Clip", ("x", "low?", "high?")).match(node), Match)
    further = NodePattern("Add", ("x", "*")).match(last_node("y = Add (a, b)"))
    assert isinstance(further, Match)
    assert list(further.values) == ["x"]


class AddOfEqualOperands(RewriteRule[list[str], str]):
    pattern = NodePattern("Add", ("x", "x"))

    def check(self, match: Match, context: list[str]) -> MatchFailure | None:
        if match["x"].name == "b":
            raise PatternNotMatched("`b` is not halved", match.node)
        return None

    def rewrite(self, match: Match, context: list[str]) -> str:
        context.append(match["x"].name or "")
        return "halved"


class Fallback(RewriteRule[list[str], str]):
    pattern = NodePattern("Add|Sub", ("x", "y"))

    def rewrite(self, match: Match, context: list[str]) -> str:
        return "fallback"


def test_the_first_rule_that_matches_is_applied_and_the_failures_before_it_are_kept() -> None:
    halve, fallback = AddOfEqualOperands(), Fallback()
    rules = RuleSet(halve, fallback)
    context: list[str] = []
    outcome = rules.apply(last_node("y = Add (a, a)"), context)
    assert (outcome.applied, outcome.result, outcome.failures, context) == (halve, "halved", (), ["a"])
    outcome = rules.apply(last_node("[sum] y = Add (b, b)"), context)
    assert (outcome.applied, outcome.result, context) == (fallback, "fallback", ["a"])
    assert [failure.description for failure in outcome.failures] == ["`b` is not halved (`sum`)"]
    outcome = RuleSet(halve).apply(last_node("[sum] y = Add (a, b)"), context)
    assert outcome.applied is None
    assert [failure.reason for failure in outcome.failures] == ["has different tensors for `x`"]
    assert list(rules) == [halve, fallback]


def test_an_op_without_rules_is_left_as_it_is() -> None:
    rules, node = RuleSet(AddOfEqualOperands()), last_node("y = Mul (a, b)")
    assert not rules.has_rule_for(node)
    assert rules.apply(node, []).applied is None
    assert not rules.has_rule_for(last_node("y = other.Add (a, b)"))
