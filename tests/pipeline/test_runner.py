"""The runner holds each pass to its word and keeps the record."""

from __future__ import annotations

import pytest
from support import fake_passes

from ryzen_compile.errors import PipelineError
from ryzen_compile.pipeline.pass_manager import run_passes, satisfied_properties
from ryzen_compile.spec.passes import Pass, PassContext

CONTEXT = PassContext(backend="onnxruntime")


def test_the_journal_holds_the_model_before_and_after() -> None:
    model = fake_passes.toy_model()
    (step,) = run_passes(model, [fake_passes.AbsToRelu()], CONTEXT, fake_passes.PROPERTIES)
    assert (step.outcome, step.reason, step.changed) == ("changed", "1 swapped", ("a",))
    assert step.properties_before == ("no/relu",)
    assert step.properties_after == ("no/abs",)
    assert (step.nodes_before, step.nodes_after) == (2, 2)
    assert satisfied_properties(model, fake_passes.PROPERTIES) == {fake_passes.NO_ABS}


def test_a_pass_with_nothing_to_do_says_why() -> None:
    steps = run_passes(
        fake_passes.toy_model(), [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()], CONTEXT, fake_passes.PROPERTIES
    )
    assert [step.outcome for step in steps] == ["changed", "nothing-to-do"]
    assert steps[1].reason == "0 swapped"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()], r"needs no/relu .*`a` is a Relu"),
        ([fake_passes.UndeclaredInvalidation()], r"`secretive` broke no/relu without saying so"),
        ([fake_passes.FalseEnsures()], r"`boastful` ensures no/neg, but `b` is a Neg"),
        ([fake_passes.UnexplainedNoOp()], r"`silent` did nothing and does not say why"),
        ([fake_passes.RefusingPass()], r"`unwilling` cannot apply: a: an Abs stands in the way"),
        (
            [fake_passes.AbsToRelu(), fake_passes.RaisingPass()],
            r"`clumsy` failed with KeyError: 'weights' \(already run: `abs-to-relu`\)",
        ),
    ],
)
def test_a_pass_that_breaks_its_word_is_named(plan: list[Pass], says: str) -> None:
    with pytest.raises(PipelineError, match=says) as refusal:
        run_passes(fake_passes.toy_model(), plan, CONTEXT, fake_passes.PROPERTIES)
    assert refusal.value.hint


def test_a_witness_sees_the_model_after_every_step() -> None:
    seen: list[tuple[str, list[str]]] = []
    run_passes(
        fake_passes.toy_model(),
        [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()],
        CONTEXT,
        fake_passes.PROPERTIES,
        on_pass_end=lambda step, model: seen.append((step.outcome, [node.op_type for node in model.graph])),
    )
    assert seen == [("changed", ["Relu", "Neg"]), ("nothing-to-do", ["Relu", "Neg"])]
