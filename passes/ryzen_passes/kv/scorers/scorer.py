"""What a score is: told of a token when it is appended, and perhaps told again as the sequence goes on."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.scorers.estimators import Estimator
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX

FLOAT, INT32, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ScoringContext:
    """Where the tokens of a step are scored: layers that keep the same number of tokens, whose states lie in one."""

    writer: NodeBuilder
    states: StateEditor
    view: StaticCacheView
    insertion_point: ir.Node
    """In front of it goes what is known before the first layer."""
    layers: Sequence[StaticCacheLayer]
    layer_indices: Sequence[int]
    """Which layer of the decoder each of `layers` is."""
    slots: int
    """How many tokens a head keeps."""
    state_suffix: str
    """What the names of these layers' states end with."""
    batch: ir.SymbolicDim | int | None
    length: ir.Value
    """(batch,) int64: how many tokens a sequence had before the step."""
    new_position: ir.Value
    """(batch, seq) int32, -1 for padding."""
    token_mask: ir.Value
    """(batch, seq) bool: which are tokens."""
    rescored_slots: int
    """How many slots a step scores again; 0: none."""
    statistics: Statistics | None
    """What a calibrated score was fitted to."""

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Write a node in front of `before` and return its output, of the type of the first input unless `dtype` is given."""
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, name_prefix=NODE_NAME_PREFIX)

    def to_float32(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Return `value` as float32."""
        return value if self.writer.types[value] == FLOAT else self.op(before, "Cast", [value], FLOAT, to=int(FLOAT))

    def norm(self, before: ir.Node, value: ir.Value, *, keepdims: bool = False) -> ir.Value:
        """Return the Euclidean norm along the last axis, float32."""
        return self.op(
            before, "ReduceL2", [self.to_float32(before, value), self.writer.int64_vector(-1)], FLOAT, keepdims=int(keepdims)
        )

    def sanitize(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return `score` with the lowest number for what is none, and nothing infinite, so that an order of scores is one."""
        low, high = self.writer.scalar(-_FLOAT32_MAX, FLOAT), self.writer.scalar(_FLOAT32_MAX, FLOAT)
        number = self.op(before, "Where", [self.op(before, "IsNaN", [score], BOOL), low, score], FLOAT)
        return self.op(before, "Clip", [number, low, high], FLOAT)


class Scorer(abc.ABC):
    """A score at work in one graph; for each `Place` an own one."""

    name: ClassVar[str]
    description: ClassVar[str]
    """What is kept, in a few words."""
    paper: ClassVar[str]
    time_dependent: ClassVar[bool] = False
    """Whether the score of a token changes as the sequence goes on, so that it is told again."""
    is_calibrated: ClassVar[bool] = False
    """Whether it takes statistics of the model."""

    def __init__(self, context: ScoringContext) -> None:
        self.context = context

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return why the tokens of `form` cannot be scored, or not by these statistics, or None."""
        return None

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return what fits the statistics of each layer of `decoder`, whose fixed form is `form`.

        Raises ModelError where the model is not one that the score is for.
        """
        raise NotImplementedError(f"{cls.name} is not calibrated")

    def begin(self) -> None:
        """Write what it needs before the first layer: states of its own."""
        return

    @abc.abstractmethod
    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return (batch, kv_heads, seq) float32: the scores of the step's tokens in `layer`; called once for each, in order."""

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return (batch, heads, rows) float32: the scores, before the step, of tokens of all layers.

        `keys` is (batch, heads, rows, size) float32, `positions` (batch, heads, rows) int32.
        """
        raise NotImplementedError(f"{self.name} tells no score again")

    def end(self, last: ir.Node) -> None:
        """Write, in front of `last`, what is left to be written when every layer was scored."""
        return
