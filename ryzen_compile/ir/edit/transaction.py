"""Run a rewrite as a transaction: it either succeeds as a whole or leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.passes import Change, Refusal


def transaction(model: ir.Model, rewrite: Callable[[ir.Model], Change | Refusal]) -> Change | Refusal:
    """Run `rewrite` on a copy of `model` that shares its weights, and replace `model` with the copy if it returns a Change.

    `model` is unchanged if `rewrite` returns a Refusal or raises an exception. A PatternNotMatched becomes a Refusal; other
    exceptions propagate.
    """
    copy = model.clone()
    try:
        outcome = rewrite(copy)
    except PatternNotMatched as error:
        return error.to_refusal()
    if isinstance(outcome, Change):
        replace_model(model, copy)
    return outcome


def replace_model(model: ir.Model, replacement: ir.Model) -> None:
    """Replace the content of `model` in place with that of `replacement`, a rewritten clone of it."""
    model.graph = replacement.graph
    model.ir_version = replacement.ir_version
    model.functions.clear()
    model.functions.update(replacement.functions)
    model.metadata_props.clear()
    model.metadata_props.update(replacement.metadata_props)
