"""What a score is: told of a token when it is appended, and perhaps told again as the sequence goes on."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import Writer
from ryzen_passes.kv.recognition.decoder import Decoder
from ryzen_passes.kv.scorers.estimators import Fit
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.states import States
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer
from ryzen_passes.kv.static.positions import STEM

FLOAT, INT32, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Place:
    """Where the tokens of a step are scored: layers that keep the same number of tokens, whose states lie in one."""

    write: Writer
    states: States
    form: FixedForm
    first: ir.Node
    """In front of it goes what is known before the first layer."""
    layers: Sequence[FixedLayer]
    numbers: Sequence[int]
    """Which layer of the decoder each of `layers` is."""
    slots: int
    """How many tokens a head keeps."""
    suffix: str
    """What the names of these layers' states end with."""
    batch: ir.SymbolicDim | int | None
    length: ir.Value
    """(batch,) int64: how many tokens a sequence had before the step."""
    new_position: ir.Value
    """(batch, seq) int32, -1 for padding."""
    real: ir.Value
    """(batch, seq) bool: which are tokens."""
    again: int
    """How many slots a step scores again; 0: none."""
    statistics: Statistics | None
    """What a calibrated score was fitted to."""

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Write a node in front of `before` and return its output, of the type of the first input unless `dtype` is given."""
        return self.write.op(before, op, inputs, attributes, dtype=dtype, stem=STEM)

    def wide(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Return `value` as float32."""
        return value if self.write.types[value] == FLOAT else self.op(before, "Cast", [value], FLOAT, to=int(FLOAT))

    def norm(self, before: ir.Node, value: ir.Value, *, keep: bool = False) -> ir.Value:
        """Return the Euclidean norm along the last axis, float32."""
        return self.op(before, "ReduceL2", [self.wide(before, value), self.write.integers(-1)], FLOAT, keepdims=int(keep))

    def sound(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return `score` with the lowest number for what is none, and nothing infinite, so that an order of scores is one."""
        low, high = self.write.number(-_LARGEST, FLOAT), self.write.number(_LARGEST, FLOAT)
        number = self.op(before, "Where", [self.op(before, "IsNaN", [score], BOOL), low, score], FLOAT)
        return self.op(before, "Clip", [number, low, high], FLOAT)


class Scoring(abc.ABC):
    """A score at work in one graph; for each `Place` an own one."""

    name: ClassVar[str]
    says: ClassVar[str]
    """What is kept, in a few words."""
    paper: ClassVar[str]
    ages: ClassVar[bool] = False
    """Whether the score of a token changes as the sequence goes on, so that it is told again."""
    is_calibrated: ClassVar[bool] = False
    """Whether it takes statistics of the model."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def problem(cls, form: FixedForm, statistics: Statistics | None) -> str | None:
        """Return why the tokens of `form` cannot be scored, or not by these statistics, or None."""
        return None

    @classmethod
    def fits(cls, decoder: Decoder, form: FixedForm) -> Sequence[Fit]:
        """Return what fits the statistics of each layer of `decoder`, whose fixed form is `form`.

        Raises ModelError where the model is not one that the score is for.
        """
        raise NotImplementedError(f"{cls.name} is not calibrated")

    def begin(self) -> None:
        """Write what it needs before the first layer: states of its own."""
        return

    @abc.abstractmethod
    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return (batch, kv_heads, seq) float32: the scores of the step's tokens in `layer`; called once for each, in order."""

    def told_again(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return (batch, heads, rows) float32: the scores, before the step, of tokens of all layers.

        `keys` is (batch, heads, rows, size) float32, `positions` (batch, heads, rows) int32.
        """
        raise NotImplementedError(f"{self.name} tells no score again")

    def end(self, last: ir.Node) -> None:
        """Write, in front of `last`, what is left to be written when every layer was scored."""
        return
