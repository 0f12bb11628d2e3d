"""Tests of transactions: a rewrite succeeds as a whole or leaves the model unchanged."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.ir.edit.transaction import transaction
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.passes import Change, Refusal

REFUSAL = Refusal(reason="the op is not supported", location="n", hint="use another op")


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model("""
            <ir_version: 10, opset_import: ["" : 21]>
            g (float[N] x) => (float[N] y) { y = Neg (x) }
        """)
    )


def edit(model: ir.Model) -> None:
    next(iter(model.graph)).op_type = "Abs"
    model.graph.opset_imports[""] = 23
    model.metadata_props["key"] = "value"


def state(model: ir.Model) -> tuple[list[str], int, dict[str, str]]:
    return [node.op_type for node in model.graph], model.graph.opset_imports[""], dict(model.metadata_props)


def test_a_change_is_adopted(model: ir.Model) -> None:
    def rewrite(copy: ir.Model) -> Change:
        edit(copy)
        return Change(changed=("n",))

    assert transaction(model, rewrite) == Change(changed=("n",))
    assert state(model) == (["Abs"], 23, {"key": "value"})


def test_a_refusal_leaves_the_model_unchanged(model: ir.Model) -> None:
    def rewrite(copy: ir.Model) -> Refusal:
        edit(copy)
        return REFUSAL

    assert transaction(model, rewrite) is REFUSAL
    assert state(model) == (["Neg"], 21, {})


def test_a_failed_match_is_a_refusal(model: ir.Model) -> None:
    def rewrite(copy: ir.Model) -> Change:
        edit(copy)
        raise PatternNotMatched(REFUSAL.reason, REFUSAL.location, REFUSAL.hint)

    assert transaction(model, rewrite) == REFUSAL
    assert state(model) == (["Neg"], 21, {})


def test_other_exceptions_propagate_and_leave_the_model_unchanged(model: ir.Model) -> None:
    def rewrite(copy: ir.Model) -> Change:
        edit(copy)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transaction(model, rewrite)
    assert state(model) == (["Neg"], 21, {})


def test_a_failed_match_names_the_node_or_tensor() -> None:
    assert PatternNotMatched("no mask", ir.node("Add", [], name="n")).description == "no mask (`n`)"
    assert PatternNotMatched("no mask", ir.node("Add", [])).location == "Add"
    assert PatternNotMatched("no mask", ir.Value(name="v")).to_refusal() == Refusal(reason="no mask", location="v")
    assert PatternNotMatched("no mask").description == str(PatternNotMatched("no mask")) == "no mask"
