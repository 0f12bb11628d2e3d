"""Tests of the pass manager: declared properties are verified, and the pass log is complete."""

from __future__ import annotations

import pytest
from support import fake_passes

from ryzen_compile.errors import InvalidGraphError, PipelineError
from ryzen_compile.ir.save import check_graph
from ryzen_compile.pipeline.pass_manager import find_invalid_pass, run_passes, satisfied_properties
from ryzen_compile.spec.passes import Pass, PassContext

CONTEXT = PassContext(backend="onnxruntime")


def test_the_pass_log_describes_the_model_before_and_after() -> None:
    model = fake_passes.toy_model()
    (record,) = run_passes(model, [fake_passes.AbsToRelu()], CONTEXT, fake_passes.PROPERTIES)
    assert (record.outcome, record.reason, record.changed) == ("changed", "1 replaced", ("a",))
    assert record.properties_before == ("no/relu",)
    assert record.properties_after == ("no/abs",)
    assert (record.nodes_before, record.nodes_after) == (2, 2)
    assert satisfied_properties(model, fake_passes.PROPERTIES) == {fake_passes.NO_ABS}


def test_a_pass_with_nothing_to_do_records_the_reason() -> None:
    pass_log = run_passes(
        fake_passes.toy_model(), [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()], CONTEXT, fake_passes.PROPERTIES
    )
    assert [record.outcome for record in pass_log] == ["changed", "nothing-to-do"]
    assert pass_log[1].reason == "0 replaced"


@pytest.mark.parametrize(
    ("passes", "code", "message"),
    [
        (
            [fake_passes.AbsToRelu(), fake_passes.NeedsNoRelu()],
            "property-missing",
            r"`needs-no-relu` requires no/relu .*`a` is a Relu",
        ),
        (
            [fake_passes.UndeclaredInvalidation()],
            "pass-defect",
            r"`undeclared-invalidation`: it invalidated no/relu, which .* does not declare",
        ),
        ([fake_passes.FalseEnsures()], "pass-defect", r"`false-ensures`: it ensures no/neg, but `b` is a Neg"),
        ([fake_passes.UnexplainedNoOp()], "pass-defect", r"`unexplained-no-op`: it changed nothing and gives no reason"),
        (
            [fake_passes.UnreportedChange()],
            "pass-defect",
            r"`unreported-change`: it reports no change \(nothing to replace\), but it changed the model: node `a` \[Relu\]",
        ),
        (
            [fake_passes.RefusalAfterChange()],
            "pass-defect",
            r"`refusal-after-change`: it refused the model after changing it \(node `a` .*\): b: a Neg is not supported",
        ),
        ([fake_passes.RefusingPass()], "pass-refused", r"a: `refusing` cannot be applied: an Abs is not supported"),
        (
            [fake_passes.AbsToRelu(), fake_passes.RaisingPass()],
            "pass-failed",
            r"`raising` failed with KeyError: 'weights' \(already run: `abs-to-relu`\)",
        ),
    ],
)
def test_a_pass_that_fails_or_violates_its_declaration_is_named(passes: list[Pass], code: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as error:
        run_passes(fake_passes.toy_model(), passes, CONTEXT, fake_passes.PROPERTIES)
    (diagnostic,) = error.value.diagnostics
    assert (diagnostic.code, diagnostic.severity) == (code, "error")
    assert diagnostic.location == ("a" if code == "pass-refused" else None)
    assert diagnostic.hint


def test_the_callback_receives_the_model_after_every_pass() -> None:
    calls: list[tuple[str, list[str]]] = []
    run_passes(
        fake_passes.toy_model(),
        [fake_passes.AbsToRelu(), fake_passes.AbsToRelu()],
        CONTEXT,
        fake_passes.PROPERTIES,
        on_pass_end=lambda record, model: calls.append((record.outcome, [node.op_type for node in model.graph])),
    )
    assert calls == [("changed", ["Relu", "Neg"]), ("nothing-to-do", ["Relu", "Neg"])]


def test_the_pass_whose_result_is_not_valid_onnx_is_found() -> None:
    passes: list[Pass] = [fake_passes.AbsToRelu(), fake_passes.DuplicateName(), fake_passes.ReluToExp()]
    model = fake_passes.toy_model()
    run_passes(model, passes, CONTEXT, fake_passes.PROPERTIES)
    with pytest.raises(InvalidGraphError) as invalid:
        check_graph(model)
    error = find_invalid_pass(invalid.value, fake_passes.toy_model(), passes, CONTEXT, fake_passes.PROPERTIES)
    assert error.diagnostics[0].code == "pass-defect"
    assert "defect in pass `duplicate-name`: its result is not valid" in error.message
    assert "single static assignment" in error.message
    valid = find_invalid_pass(invalid.value, fake_passes.toy_model(), passes[:1], CONTEXT, fake_passes.PROPERTIES)
    assert valid is invalid.value


def test_a_contradiction_after_a_pass_is_not_called_a_defect_of_the_pass() -> None:
    passes: list[Pass] = [fake_passes.AbsToRelu(), fake_passes.WrongShape()]
    model = fake_passes.toy_model()
    run_passes(model, passes, CONTEXT, fake_passes.PROPERTIES)
    with pytest.raises(InvalidGraphError) as invalid:
        check_graph(model)
    error = find_invalid_pass(invalid.value, fake_passes.toy_model(), passes, CONTEXT, fake_passes.PROPERTIES)
    assert error.diagnostics[0].code == "contradictory-graph"
    assert "contradict each other after `wrong-shape`" in error.message
