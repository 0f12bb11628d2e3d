"""The runner holds each pass to its word and keeps the record."""

from __future__ import annotations

import pytest
from support import fake_passes

from ryzen_compile.errors import PlanError
from ryzen_compile.pipeline.pass_manager import holding, run
from ryzen_compile.spec.passes import Context, Pass

CONTEXT = Context(backend="onnxruntime")


def test_the_journal_holds_the_model_before_and_after() -> None:
    model = fake_passes.toy()
    (step,) = run(model, [fake_passes.AbsToRelu()], CONTEXT, fake_passes.FACTS)
    assert (step.decision, step.because, step.changed) == ("changed", "1 swapped", ("a",))
    assert step.facts_before == ("no/relu",)
    assert step.facts_after == ("no/abs",)
    assert (step.nodes_before, step.nodes_after) == (2, 2)
    assert holding(model, fake_passes.FACTS) == {fake_passes.NO_ABS}


def test_a_pass_with_nothing_to_do_says_why() -> None:
    steps = run(fake_passes.toy(), [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()], CONTEXT, fake_passes.FACTS)
    assert [step.decision for step in steps] == ["changed", "nothing-to-do"]
    assert steps[1].because == "0 swapped"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], r"needs no/relu .*`a` is a Relu"),
        ([fake_passes.Secretive()], r"`secretive` broke no/relu without saying so"),
        ([fake_passes.Boastful()], r"`boastful` ensures no/neg, but `b` is a Neg"),
        ([fake_passes.Silent()], r"`silent` did nothing and does not say why"),
        ([fake_passes.Unwilling()], r"`unwilling` cannot apply: a: an Abs stands in the way"),
        (
            [fake_passes.AbsToRelu(), fake_passes.Clumsy()],
            r"`clumsy` failed with KeyError: 'weights' \(already run: `abs-to-relu`\)",
        ),
    ],
)
def test_a_pass_that_breaks_its_word_is_named(plan: list[Pass], says: str) -> None:
    with pytest.raises(PlanError, match=says) as refusal:
        run(fake_passes.toy(), plan, CONTEXT, fake_passes.FACTS)
    assert refusal.value.hint


def test_a_witness_sees_the_model_after_every_step() -> None:
    seen: list[tuple[str, list[str]]] = []
    run(
        fake_passes.toy(),
        [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()],
        CONTEXT,
        fake_passes.FACTS,
        witness=lambda step, model: seen.append((step.decision, [node.op_type for node in model.graph])),
    )
    assert seen == [("changed", ["Relu", "Neg"]), ("nothing-to-do", ["Relu", "Neg"])]
