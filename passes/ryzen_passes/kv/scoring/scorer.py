"""Scorer interface in ONNX: writes the nodes that score tokens when they are appended and, for some scores, again later."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile import registry
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.kv import SCORES_GROUP
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.scoring.estimators import Estimator
from ryzen_passes.kv.scoring.statistics import Statistics
from ryzen_passes.kv.scoring.torch_scorer import TorchScorer
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX

OTHER_SCORE_HINT = "use another score: `ryzen-compile passes kv-evict` lists them"
FLOAT = ir.DataType.FLOAT
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

    def position_score(self, before: ir.Node) -> ir.Value:
        """Return (batch, seq) float32: the positions of the step's tokens, -1 for padding; exact up to 2^24."""
        return self.op(before, "Cast", [self.new_position], FLOAT, to=int(FLOAT))

    def expand_to_heads(self, before: ir.Node, score: ir.Value, layer: StaticCacheLayer) -> ir.Value:
        """Return `score` (batch, seq) repeated for the heads of `layer`: (batch, kv_heads, seq)."""
        column = self.op(before, "Unsqueeze", [score, self.writer.int64_vector(1)])
        return self.op(before, "Expand", [column, self.writer.int64_vector(1, layer.spec.kv_heads, 1)])

    def sanitize(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return `score` with NaN replaced by the lowest float32 and infinities clipped, so that scores have a total order."""
        low, high = self.writer.scalar(-_FLOAT32_MAX, FLOAT), self.writer.scalar(_FLOAT32_MAX, FLOAT)
        without_nan = self.op(before, "Where", [self.op(before, "IsNaN", [score], ir.DataType.BOOL), low, score], FLOAT)
        return self.op(before, "Clip", [without_nan, low, high], FLOAT)


class Scorer(abc.ABC):
    """Base class of scores; each instance writes one score into one `ScoringContext`.

    The docstring of a subclass holds the formula, with symbols and shapes, and the title of the paper.
    """

    name: ClassVar[str]
    """Value of the option `score` of kv-evict."""
    description: ClassVar[str]
    """The tokens that are kept, as a short phrase: `keeps keys with a small norm`."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv id of the paper; empty if there is none."""
    torch_form: ClassVar[type[TorchScorer]]
    """The same score in PyTorch."""
    time_dependent: ClassVar[bool] = False
    """Whether the score of a token changes as the sequence grows, so that kept tokens are rescored."""
    statistics_names: ClassVar[tuple[str, ...]] = ()
    """Names of the statistics of each layer that the score reads; empty if it is not calibrated."""

    def __init__(self, context: ScoringContext) -> None:
        self.context = context

    @classmethod
    def is_calibrated(cls) -> bool:
        """Return whether the score needs statistics of the model."""
        return bool(cls.statistics_names)

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return why the tokens of `view` cannot be scored with `statistics`, or None if they can."""
        return None

    @classmethod
    def caution(cls, view: StaticCacheView) -> str | None:
        """Return why the score is known to keep the wrong tokens of `view`, with what was measured, or None."""
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


def find_scorer(name: str) -> type[Scorer]:
    """Return the scorer of the score `name`. Raises UsageError if there is no such score."""
    return registry.find_class(SCORES_GROUP, name, Scorer)  # type: ignore[type-abstract]
