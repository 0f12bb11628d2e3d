"""Scores: what a token is worth keeping, told when it is appended; high is kept. (batch, kv_heads, seq) float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_passes._attention.write import Writer
from ryzen_passes._kv.fixed_form import FixedLayer

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Step:
    """What a score may look at."""

    write: Writer
    before: ir.Node
    """Where its nodes go."""
    layer: FixedLayer
    new_position: ir.Value
    """(batch, seq) int32, -1 for padding."""


@dataclass(frozen=True)
class Score:
    """One way to tell what a token is worth."""

    says: str
    paper: str
    write: Callable[[Step], ir.Value]


def _norm(step: Step, value: ir.Value) -> ir.Value:
    wide = value
    if step.write.types[value] != _FLOAT:
        wide = step.write.op(step.before, "Cast", [value], {"to": int(_FLOAT)}, dtype=_FLOAT, stem="kv")
    return step.write.op(step.before, "ReduceL2", [wide, step.write.integers(-1)], {"keepdims": 0}, dtype=_FLOAT, stem="kv")


def _knorm(step: Step) -> ir.Value:
    return step.write.op(step.before, "Neg", [_norm(step, step.layer.key.new)], stem="kv")


def _value_norm(step: Step) -> ir.Value:
    return _norm(step, step.layer.value.new)


def _position(step: Step) -> ir.Value:
    write, before = step.write, step.before
    number = write.op(before, "Cast", [step.new_position], {"to": int(_FLOAT)}, dtype=_FLOAT, stem="kv")
    apart = write.op(before, "Unsqueeze", [number, write.integers(1)], stem="kv")
    heads = write.integers(1, step.layer.told.kv_heads, 1)
    return write.op(before, "Expand", [apart, heads], stem="kv")


SCORES = {
    "knorm": Score("keys of small norm are kept: -|k|", "Devoto et al. 2024, arXiv 2406.11430", _knorm),
    "value-norm": Score("values of large norm are kept: |v|", "the value term of arXiv 2406.12335", _value_norm),
    "position": Score("the latest are kept: a window behind the sinks", "Xiao et al. 2023, arXiv 2309.17453", _position),
}
