"""TriAttention: how much attention a key would get from the queries that a head usually asks, seen from where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.recognition.rotation import Rotation, recognize_rotation
from ryzen_passes.kv.scorers.estimators import Estimator
from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer, ScoringContext
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView

Array = np.ndarray[Any, Any]

_QUERY_DISTANCES = tuple(2**power for power in range(17))
"""How many tokens ahead the queries stand that are averaged over: 1, 2, 4, ..., 65,536."""
_MIN_TOKENS = 256


class TriAttentionScorer(Scorer):
    """mean over distances d of sum over planes f of Re[q_f conj(k_f) e^(i w_f (t + d))], plus sum over f of |k_f| r_f.

    q_f is the mean query of the group before its rotation, r_f how far queries spread about it, E|q_f| - |E q_f|, both from
    calibration; k_f is the cached key, and t the position of the step. Averaged over the distances the first term is one
    product of the key with a vector that turns with t.
    """

    name: ClassVar[str] = "triattention"
    description: ClassVar[str] = "keys that the usual queries of the head would attend to are kept"
    paper: ClassVar[str] = "TriAttention 2026, arXiv 2604.04921, with the mean over distances"
    time_dependent: ClassVar[bool] = True
    is_calibrated: ClassVar[bool] = True

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context)
        self._next_layer = 0

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return that keys are not turned alike in all layers, or otherwise than where the statistics are from."""
        found = _common_rotation(view)
        if isinstance(found, str) or statistics is None:
            return found if isinstance(found, str) else None
        known = statistics.tensor(0, "pairs"), statistics.tensor(0, "frequency")
        is_same = np.array_equal(known[0], found.pairs) and np.allclose(known[1], found.frequency, rtol=1e-5)
        return None if is_same else "its keys are turned by other angles than those of the model of the statistics"

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return the mean queries of each layer; raises ModelError where keys are not turned alike in all."""
        rotation = _common_rotation(view)
        if isinstance(rotation, str):
            raise ModelError(rotation, hint="take a score that does not need to know: kvzap, keydiff, knorm")
        queries = [layer.attention.inputs[0] for layer in decoder.layers]
        names = [query.name or "" for query in queries if query is not None]
        return [_QueryStatistics((name,), layer.kv_heads, rotation) for name, layer in zip(names, decoder.layers, strict=True)]

    def begin(self) -> None:
        """Write the query of each head as it is seen from the step."""
        place, found = self.context, _common_rotation(self.context.view)
        assert isinstance(found, Rotation)
        self._rotation = found
        query = np.concatenate([self._statistic(number, "query") for number in place.layer_indices])
        spread = np.concatenate([self._statistic(number, "spread") for number in place.layer_indices])
        when = place.op(place.insertion_point, "Unsqueeze", [place.length, place.writer.int64_vector(1, 2)])
        angles = found.write_cos_sin(place.writer, place.insertion_point, when, FLOAT)
        self._query = found.write_rotation(
            place.writer, place.insertion_point, place.writer.constant(query[None, :, None], FLOAT), angles
        )
        self._spread = place.writer.constant(spread[None, :, :, None], FLOAT)

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores, each seen from the token itself."""
        place, number = self.context, self.context.layer_indices[self._next_layer]
        self._next_layer += 1
        apart = place.op(before, "Unsqueeze", [place.new_position, place.writer.int64_vector(1)])
        angles = self._rotation.write_cos_sin(place.writer, before, apart, FLOAT)
        query = place.writer.constant(self._statistic(number, "query")[None, :, None], FLOAT)
        seen = self._rotation.write_rotation(place.writer, before, query, angles)
        keys = place.to_float32(before, layer.key.update)
        product = place.op(
            before, "ReduceSum", [place.op(before, "Mul", [keys, seen]), place.writer.int64_vector(3)], keepdims=0
        )
        spread = place.writer.constant(self._statistic(number, "spread")[None, :, :, None], FLOAT)
        return place.op(before, "Add", [product, self._weighted_plane_norms(before, keys, spread)])

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores as seen from the step."""
        place, first = self.context, self.context.insertion_point
        column = place.op(first, "Transpose", [self._query], perm=[0, 1, 3, 2])
        product = place.op(first, "Squeeze", [place.op(first, "MatMul", [keys, column]), place.writer.int64_vector(3)])
        return place.op(first, "Add", [product, self._weighted_plane_norms(first, keys, self._spread)])

    def _statistic(self, layer_index: int, name: str) -> Array:
        assert self.context.statistics is not None
        return self.context.statistics.tensor(layer_index, name)

    def _weighted_plane_norms(self, before: ir.Node, keys: ir.Value, spread: ir.Value) -> ir.Value:
        """Return (batch, heads, rows): the lengths of `keys` in their planes, weighed by `spread` (1, heads, planes, 1)."""
        place = self.context
        both = np.zeros((len(self._rotation.scale), len(self._rotation.pairs)), np.float32)
        for plane, pair in enumerate(self._rotation.pairs):
            both[pair, plane] = 1.0
        squares = place.op(before, "MatMul", [place.op(before, "Mul", [keys, keys]), place.writer.constant(both, FLOAT)])
        return place.op(
            before,
            "Squeeze",
            [place.op(before, "MatMul", [place.op(before, "Sqrt", [squares]), spread]), place.writer.int64_vector(3)],
        )


def _common_rotation(view: StaticCacheView) -> Rotation | str:
    """Return how keys are turned in all layers, or why that cannot be said."""
    first: Rotation | None = None
    for layer in view.layers:
        found = recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.spec.key.head_size)
        if isinstance(found, str):
            return f"`{layer.spec.attention_node}`: {found}"
        if first is not None and not first.same_as(found):
            return f"`{layer.spec.attention_node}` turns its keys by other angles than the first layer"
        first = first or found
    return first if first is not None else "there is no layer"


@dataclass
class _QueryStatistics:
    """The queries of one layer, turned back to position 0, summed up."""

    tensor_names: tuple[str, ...]
    kv_heads: int
    rotation: Rotation
    count: int = 0
    query_sum: Array | float = 0.0
    """(heads, size)"""
    plane_norms: Array | float = 0.0
    """(heads, planes)"""

    @property
    def min_tokens(self) -> int:
        """A few hundred tokens."""
        return _MIN_TOKENS

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a stream: queries (1, heads, seq, size)."""
        queries = self.rotation.rotate(tensors[0][0], -np.arange(tensors[0].shape[2]))
        self.count += queries.shape[1]
        self.query_sum = self.query_sum + queries.sum(axis=1)
        self.plane_norms = self.plane_norms + self._plane_norms(queries).sum(axis=1)

    def solve(self) -> Mapping[str, Array]:
        """Return `query` (kv_heads, size), averaged over distances, `spread` (kv_heads, planes), and how keys turn."""
        mean = np.asarray(self.query_sum) / self.count
        spread = np.asarray(self.plane_norms) / self.count - self._plane_norms(mean)
        ahead = np.mean([self.rotation.rotate(mean, np.array(distance)) for distance in _QUERY_DISTANCES], axis=0)
        groups = (self.kv_heads, len(mean) // self.kv_heads, -1)
        return {
            "query": ahead.reshape(groups).mean(axis=1).astype(np.float32),
            "spread": spread.reshape(groups).mean(axis=1).astype(np.float32),
            "pairs": self.rotation.pairs,
            "frequency": self.rotation.frequency,
        }

    def _plane_norms(self, vectors: Array) -> Array:
        """Return the lengths of `vectors` (..., size) in the planes, (..., planes)."""
        sides = (vectors[..., self.rotation.pairs[:, side]] for side in (0, 1))
        return np.hypot(next(sides), next(sides))
