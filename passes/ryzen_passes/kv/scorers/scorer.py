"""Scorer interface: writes the nodes that score tokens when they are appended and, for some scores, again later."""

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
    """Graph context of a scorer: layers with the same number of slots, whose states are stacked in one tensor."""

    writer: NodeBuilder
    states: StateEditor
    view: StaticCacheView
    insertion_point: ir.Node
    """Nodes that do not depend on the layers are inserted before this node."""
    layers: Sequence[StaticCacheLayer]
    layer_indices: Sequence[int]
    """Index in the decoder of each of `layers`."""
    slots: int
    """Number of tokens that a head keeps."""
    state_suffix: str
    """Suffix of the names of these layers' states."""
    batch: ir.SymbolicDim | int | None
    length: ir.Value
    """(batch,) int64: number of tokens in each sequence before the step."""
    new_position: ir.Value
    """(batch, seq) int32: positions of the step's tokens, -1 for padding."""
    token_mask: ir.Value
    """(batch, seq) bool: true for tokens, false for padding."""
    rescored_slots: int
    """Number of slots that a step rescores; 0: none."""
    statistics: Statistics | None
    """Statistics of the model for a calibrated score; None for other scores."""

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Insert a node before `before`; return its output, which has the type of the first input unless `dtype` is given."""
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, name_prefix=NODE_NAME_PREFIX)

    def to_float32(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Return `value` cast to float32; no cast is inserted if it is float32."""
        return value if self.writer.types[value] == FLOAT else self.op(before, "Cast", [value], FLOAT, to=int(FLOAT))

    def norm(self, before: ir.Node, value: ir.Value, *, keepdims: bool = False) -> ir.Value:
        """Return the Euclidean norm of `value` along the last axis, as float32."""
        return self.op(
            before, "ReduceL2", [self.to_float32(before, value), self.writer.int64_vector(-1)], FLOAT, keepdims=int(keepdims)
        )

    def sanitize(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return `score` with NaN replaced by the lowest float32 and infinities clipped, so that scores have a total order."""
        low, high = self.writer.scalar(-_FLOAT32_MAX, FLOAT), self.writer.scalar(_FLOAT32_MAX, FLOAT)
        without_nan = self.op(before, "Where", [self.op(before, "IsNaN", [score], BOOL), low, score], FLOAT)
        return self.op(before, "Clip", [without_nan, low, high], FLOAT)


class Scorer(abc.ABC):
    """Base class of scores; each instance writes one score into one `ScoringContext`."""

    name: ClassVar[str]
    description: ClassVar[str]
    """The tokens that are kept, as a short phrase."""
    paper: ClassVar[str]
    """Reference to the paper."""
    time_dependent: ClassVar[bool] = False
    """Whether the score of a token changes as the sequence grows, so that kept tokens are rescored."""
    is_calibrated: ClassVar[bool] = False
    """Whether the score needs statistics of the model."""

    def __init__(self, context: ScoringContext) -> None:
        self.context = context

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return why the tokens of `view` cannot be scored with `statistics`, or None if they can."""
        return None

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return one estimator of the statistics per layer of `decoder`, whose static cache view is `view`.

        Raises ModelError if the score does not support the model, and NotImplementedError if it is not calibrated.
        """
        raise NotImplementedError(f"`{cls.name}` is not calibrated")

    def begin(self) -> None:
        """Write nodes and states that are needed before the first layer."""
        return

    @abc.abstractmethod
    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return (batch, kv_heads, seq) float32: scores of the step's tokens in `layer`; called once per layer, in order."""

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return (batch, heads, rows) float32: new scores, before the step, of kept tokens of all layers.

        `keys` is (batch, heads, rows, head_size) float32, `positions` (batch, heads, rows) int32; `heads` counts the KV heads
        of all layers. Raises NotImplementedError if the score is not time-dependent.
        """
        raise NotImplementedError(f"`{self.name}` does not rescore tokens")

    def end(self, last: ir.Node) -> None:
        """Write the remaining nodes before `last`, after every layer is scored."""
        return
