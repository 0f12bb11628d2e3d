"""The runner holds each pass to its word and keeps the record."""

from __future__ import annotations

import pytest
import toys

from ryzen_compile.contract import Context, Pass
from ryzen_compile.errors import PlanError
from ryzen_compile.plan.runner import holding, run

CONTEXT = Context(backend="onnxruntime")


def test_the_journal_holds_the_model_before_and_after() -> None:
    model = toys.toy()
    (step,) = run(model, [toys.AbsToRelu()], CONTEXT, toys.FACTS)
    assert (step.decision, step.because, step.changed) == ("changed", "1 swapped", ("a",))
    assert step.facts_before == ("no/relu",)
    assert step.facts_after == ("no/abs",)
    assert (step.nodes_before, step.nodes_after) == (2, 2)
    assert holding(model, toys.FACTS) == {toys.NO_ABS}


def test_a_pass_with_nothing_to_do_says_why() -> None:
    steps = run(toys.toy(), [toys.AbsToRelu(), toys.AbsToRelu()], CONTEXT, toys.FACTS)
    assert [step.decision for step in steps] == ["changed", "nothing-to-do"]
    assert steps[1].because == "0 swapped"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([toys.AbsToRelu(), toys.NeedsNoRelu()], r"needs no/relu .*`a` is a Relu"),
        ([toys.Secretive()], r"`secretive` broke no/relu without saying so"),
        ([toys.Boastful()], r"`boastful` ensures no/neg, but `b` is a Neg"),
        ([toys.Silent()], r"`silent` did nothing and does not say why"),
        ([toys.Unwilling()], r"`unwilling` cannot apply: a: an Abs stands in the way"),
        ([toys.AbsToRelu(), toys.Clumsy()], r"`clumsy` failed with KeyError: 'weights' \(already run: `abs-to-relu`\)"),
    ],
)
def test_a_pass_that_breaks_its_word_is_named(plan: list[Pass], says: str) -> None:
    with pytest.raises(PlanError, match=says) as refusal:
        run(toys.toy(), plan, CONTEXT, toys.FACTS)
    assert refusal.value.hint


def test_a_witness_sees_the_model_after_every_step() -> None:
    seen: list[tuple[str, list[str]]] = []
    run(
        toys.toy(),
        [toys.AbsToRelu(), toys.AbsToRelu()],
        CONTEXT,
        toys.FACTS,
        witness=lambda step, model: seen.append((step.decision, [node.op_type for node in model.graph])),
    )
    assert seen == [("changed", ["Relu", "Neg"]), ("nothing-to-do", ["Relu", "Neg"])]
