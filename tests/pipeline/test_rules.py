"""A plan is refused for reasons that follow from its facts, or that the table of rules states."""

from __future__ import annotations

import pytest
from support import fake_passes

from ryzen_compile import registry
from ryzen_compile.pipeline import rules
from ryzen_compile.pipeline.ordering import order_passes
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.rules import Rule, find_problems


def test_a_plan_whose_facts_hold_has_no_problems() -> None:
    assert find_problems([fake_passes.NeedsNoRelu(), fake_passes.AbsToRelu()], {fake_passes.NO_RELU}, []) == []


def test_what_an_earlier_pass_breaks_is_refused_with_its_name() -> None:
    (problem,) = find_problems([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU}, [])
    assert problem.code == "RC001"
    assert "which `abs-to-relu` breaks" in problem.message
    assert problem.hint == "list `needs-no-relu` before `abs-to-relu`"


def test_what_never_held_is_refused_with_what_would_ensure_it() -> None:
    (problem,) = find_problems([fake_passes.NeedsNoNeg(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU}, [])
    assert problem.code == "RC002"
    assert problem.hint == "list `needs-no-relu` before `needs-no-neg`"


def test_a_fact_that_is_restored_is_no_longer_broken() -> None:
    plan = [fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()]
    restored = find_problems([plan[0], plan[1]], {fake_passes.NO_RELU}, [])
    assert [problem.code for problem in restored] == ["RC001"]


def test_a_rule_of_the_table_is_found_in_any_distance() -> None:
    rule = Rule(code="RC199", first="abs-to-relu", then="needs-no-neg", reason="b", hint="i", example="")
    plan = [fake_passes.AbsToRelu(), fake_passes.UndeclaredInvalidation(), fake_passes.NeedsNoNeg()]
    assert [problem.code for problem in find_problems(plan, {fake_passes.NO_NEG}, [rule])] == ["RC199"]
    assert find_problems([plan[2], plan[0]], {fake_passes.NO_NEG}, [rule]) == []


def test_every_rule_that_ships_is_broken_by_its_example() -> None:
    for rule in rules.load_rules():
        assert rule.code.startswith("RC1"), rule
        found = find_problems(parse(rule.example), registry.properties(), [rule])
        assert rule.code in {problem.code for problem in found}, rule


def test_an_order_that_facts_ask_for_is_found_and_explained() -> None:
    ordered, moves = order_passes([fake_passes.NeedsNoNeg(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU})
    assert [pass_.name for pass_ in ordered] == ["needs-no-relu", "needs-no-neg"]
    assert [str(move) for move in moves] == [
        "`needs-no-relu` goes before `needs-no-neg`: it ensures no/neg, which `needs-no-neg` needs"
    ]


def test_a_pass_that_breaks_what_another_needs_goes_last() -> None:
    ordered, moves = order_passes([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], {fake_passes.NO_RELU})
    assert [pass_.name for pass_ in ordered] == ["needs-no-relu", "abs-to-relu"]
    assert "`abs-to-relu` breaks no/relu" in str(moves[0])


def test_passes_that_nothing_orders_keep_the_users_order() -> None:
    plan = (fake_passes.UndeclaredInvalidation(), fake_passes.UnexplainedNoOp(), fake_passes.RaisingPass())
    assert order_passes(plan, set()) == (plan, ())


@pytest.mark.parametrize("turned", [False, True])
def test_a_circle_of_wishes_keeps_the_users_order_for_problems_to_refuse(turned: bool) -> None:
    plan = [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()]
    ordered, moves = order_passes(plan[::-1] if turned else plan, set())
    assert len(ordered) == 2
    assert moves == ()
