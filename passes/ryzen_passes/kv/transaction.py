"""Attempts: a rewrite that may find, half-way, that it cannot be done, and then leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import replace_model
from ryzen_compile.spec.passes import Change, Refusal
from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched


def transaction(model: ir.Model, rewrite: Callable[[ir.Model], Change]) -> Change | Refusal:
    """Run `rewrite` on a copy that shares the weights; where it succeeds `model` becomes the copy."""
    copy = model.clone()
    try:
        change = rewrite(copy)
    except PatternNotMatched as why:
        return Refusal(reason=why.reason, location=why.location, hint=why.hint)
    replace_model(model, copy)
    return change
