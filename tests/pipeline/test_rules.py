"""Tests of pipeline order and composition: problems follow from properties or from the table of rules."""

from __future__ import annotations

import pytest
from support import fake_passes

from ryzen_compile import registry
from ryzen_compile.diagnostic import CODES
from ryzen_compile.pipeline import rules
from ryzen_compile.pipeline.ordering import order_passes
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.rules import Rule, find_problems


def test_a_pipeline_whose_requirements_hold_has_no_problems() -> None:
    assert find_problems([fake_passes.NeedsNoRelu(), fake_passes.AbsToRelu()], {fake_passes.NO_RELU}, []) == []


def test_a_property_that_an_earlier_pass_invalidates_is_reported_with_that_pass() -> None:
    (problem,) = find_problems([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU}, [])
    assert problem.code == "property-invalidated"
    assert "which `abs-to-relu` invalidates" in problem.message
    assert problem.hint == "list `needs-no-relu` before `abs-to-relu`"


def test_a_property_that_never_held_is_reported_with_the_pass_that_ensures_it() -> None:
    (problem,) = find_problems([fake_passes.NeedsNoNeg(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU}, [])
    assert problem.code == "property-missing"
    assert problem.hint == "list `needs-no-relu` before `needs-no-neg`"


def test_an_invalidated_property_is_a_problem_unless_a_pass_restores_it() -> None:
    invalidating, restoring, requiring = fake_passes.AbsToRelu(), fake_passes.ReluToExp(), fake_passes.NeedsNoRelu()
    problems = find_problems([invalidating, requiring], {fake_passes.NO_RELU}, [])
    assert [problem.code for problem in problems] == ["property-invalidated"]
    assert find_problems([invalidating, restoring, requiring], {fake_passes.NO_RELU}, []) == []


def test_a_rule_applies_at_any_distance() -> None:
    rule = Rule(code="acme-abs-after-relu", first="abs-to-relu", then="needs-no-neg", reason="b", hint="i", example="")
    passes = [fake_passes.AbsToRelu(), fake_passes.UndeclaredInvalidation(), fake_passes.NeedsNoNeg()]
    assert [problem.code for problem in find_problems(passes, {fake_passes.NO_NEG}, [rule])] == ["acme-abs-after-relu"]
    assert find_problems([passes[2], passes[0]], {fake_passes.NO_NEG}, [rule]) == []


def test_every_shipped_rule_is_violated_by_its_example() -> None:
    for rule in rules.load_rules():
        assert rule.code not in CODES, rule
        problems = find_problems(parse(rule.example), registry.properties(), [rule])
        assert rule.code in {problem.code for problem in problems}, rule


def test_passes_are_moved_where_properties_require_it_with_a_reason() -> None:
    ordered, moves = order_passes([fake_passes.NeedsNoNeg(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU})
    assert [pass_.name for pass_ in ordered] == ["needs-no-relu", "needs-no-neg"]
    assert [str(move) for move in moves] == [
        "`needs-no-relu` runs before `needs-no-neg`: it ensures no/neg, which `needs-no-neg` requires"
    ]


def test_a_pass_that_invalidates_a_required_property_runs_last() -> None:
    ordered, moves = order_passes([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU})
    assert [pass_.name for pass_ in ordered] == ["needs-no-relu", "abs-to-relu"]
    assert "`abs-to-relu` invalidates no/relu" in str(moves[0])


def test_passes_without_constraints_keep_the_users_order() -> None:
    passes = (fake_passes.UndeclaredInvalidation(), fake_passes.UnexplainedNoOp(), fake_passes.RaisingPass())
    assert order_passes(passes, set()) == (passes, ())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cycle_of_constraints_keeps_the_users_order(reverse: bool) -> None:
    passes = [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()]
    ordered, moves = order_passes(passes[::-1] if reverse else passes, set())
    assert len(ordered) == 2
    assert moves == ()
