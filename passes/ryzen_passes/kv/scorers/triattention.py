"""TriAttention: how much attention a key would get from the queries that a head usually asks, seen from where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_passes.kv.recognition.decoder import Decoder
from ryzen_passes.kv.recognition.rotation import Rotation, rotation_of
from ryzen_passes.kv.scorers.estimators import Fit
from ryzen_passes.kv.scorers.scorer import FLOAT, Place, Scoring
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer

Array = np.ndarray[Any, Any]

_AHEAD = tuple(2**power for power in range(17))
"""How many tokens ahead the queries stand that are averaged over: 1, 2, 4, ..., 65,536."""
_LEAST = 256


class TriAttention(Scoring):
    """mean over distances d of sum over planes f of Re[q_f conj(k_f) e^(i w_f (t + d))], plus sum over f of |k_f| r_f.

    q_f is the mean query of the group before its rotation, r_f how far queries spread about it, E|q_f| - |E q_f|, both from
    calibration; k_f is the cached key, and t the position of the step. Averaged over the distances the first term is one
    product of the key with a vector that turns with t.
    """

    name: ClassVar[str] = "triattention"
    says: ClassVar[str] = "keys that the usual queries of the head would attend to are kept"
    paper: ClassVar[str] = "TriAttention 2026, arXiv 2604.04921, with the mean over distances"
    ages: ClassVar[bool] = True
    is_calibrated: ClassVar[bool] = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._at = 0

    @classmethod
    def problem(cls, form: FixedForm, statistics: Statistics | None) -> str | None:
        """Return that keys are not turned alike in all layers, or otherwise than where the statistics are from."""
        found = _rotation(form)
        if isinstance(found, str) or statistics is None:
            return found if isinstance(found, str) else None
        known = statistics.tensor(0, "pairs"), statistics.tensor(0, "frequency")
        is_same = np.array_equal(known[0], found.pairs) and np.allclose(known[1], found.frequency, rtol=1e-5)
        return None if is_same else "its keys are turned by other angles than those of the model of the statistics"

    @classmethod
    def fits(cls, decoder: Decoder, form: FixedForm) -> Sequence[Fit]:
        """Return the mean queries of each layer; raises ModelError where keys are not turned alike in all."""
        rotation = _rotation(form)
        if isinstance(rotation, str):
            raise ModelError(rotation, hint="take a score that does not need to know: kvzap, keydiff, knorm")
        queries = [layer.attention.inputs[0] for layer in decoder.layers]
        names = [query.name or "" for query in queries if query is not None]
        return [_Queries((name,), layer.kv_heads, rotation) for name, layer in zip(names, decoder.layers, strict=True)]

    def begin(self) -> None:
        """Write the query of each head as it is seen from the step."""
        place, found = self.place, _rotation(self.place.form)
        assert isinstance(found, Rotation)
        self._rotation = found
        query = np.concatenate([self._told(number, "query") for number in place.numbers])
        spread = np.concatenate([self._told(number, "spread") for number in place.numbers])
        when = place.op(place.first, "Unsqueeze", [place.length, place.write.integers(1, 2)])
        angles = found.angles(place.write, place.first, when, FLOAT)
        self._query = found.turn(place.write, place.first, place.write.constant(query[None, :, None], FLOAT), angles)
        self._spread = place.write.constant(spread[None, :, :, None], FLOAT)

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores, each seen from the token itself."""
        place, number = self.place, self.place.numbers[self._at]
        self._at += 1
        apart = place.op(before, "Unsqueeze", [place.new_position, place.write.integers(1)])
        angles = self._rotation.angles(place.write, before, apart, FLOAT)
        query = place.write.constant(self._told(number, "query")[None, :, None], FLOAT)
        seen = self._rotation.turn(place.write, before, query, angles)
        keys = place.wide(before, layer.key.new)
        product = place.op(before, "ReduceSum", [place.op(before, "Mul", [keys, seen]), place.write.integers(3)], keepdims=0)
        spread = place.write.constant(self._told(number, "spread")[None, :, :, None], FLOAT)
        return place.op(before, "Add", [product, self._lengths(before, keys, spread)])

    def told_again(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores as seen from the step."""
        place, first = self.place, self.place.first
        column = place.op(first, "Transpose", [self._query], perm=[0, 1, 3, 2])
        product = place.op(first, "Squeeze", [place.op(first, "MatMul", [keys, column]), place.write.integers(3)])
        return place.op(first, "Add", [product, self._lengths(first, keys, self._spread)])

    def _told(self, number: int, word: str) -> Array:
        assert self.place.statistics is not None
        return self.place.statistics.tensor(number, word)

    def _lengths(self, before: ir.Node, keys: ir.Value, spread: ir.Value) -> ir.Value:
        """Return (batch, heads, rows): the lengths of `keys` in their planes, weighed by `spread` (1, heads, planes, 1)."""
        place = self.place
        both = np.zeros((len(self._rotation.scale), len(self._rotation.pairs)), np.float32)
        for plane, pair in enumerate(self._rotation.pairs):
            both[pair, plane] = 1.0
        squares = place.op(before, "MatMul", [place.op(before, "Mul", [keys, keys]), place.write.constant(both, FLOAT)])
        return place.op(
            before,
            "Squeeze",
            [place.op(before, "MatMul", [place.op(before, "Sqrt", [squares]), spread]), place.write.integers(3)],
        )


def _rotation(form: FixedForm) -> Rotation | str:
    """Return how keys are turned in all layers, or why that cannot be said."""
    first: Rotation | None = None
    for layer in form.layers:
        found = rotation_of(form, layer.key.new, layer.told.kv_heads, layer.told.key.size)
        if isinstance(found, str):
            return f"`{layer.told.attention}`: {found}"
        if first is not None and not first.same_as(found):
            return f"`{layer.told.attention}` turns its keys by other angles than the first layer"
        first = first or found
    return first if first is not None else "there is no layer"


@dataclass
class _Queries:
    """The queries of one layer, turned back to position 0, summed up."""

    names: tuple[str, ...]
    kv_heads: int
    rotation: Rotation
    count: int = 0
    total: Array | float = 0.0
    """(heads, size)"""
    lengths: Array | float = 0.0
    """(heads, planes)"""

    @property
    def least(self) -> int:
        """A few hundred tokens."""
        return _LEAST

    def add(self, found: Sequence[Array], recent: int, counted: int) -> None:
        """Add a stream: queries (1, heads, seq, size)."""
        queries = self.rotation.turned(found[0][0], -np.arange(found[0].shape[2]))
        self.count += queries.shape[1]
        self.total = self.total + queries.sum(axis=1)
        self.lengths = self.lengths + self._in_planes(queries).sum(axis=1)

    def solve(self) -> Mapping[str, Array]:
        """Return `query` (kv_heads, size), averaged over distances, `spread` (kv_heads, planes), and how keys turn."""
        mean = np.asarray(self.total) / self.count
        spread = np.asarray(self.lengths) / self.count - self._in_planes(mean)
        ahead = np.mean([self.rotation.turned(mean, np.array(distance)) for distance in _AHEAD], axis=0)
        groups = (self.kv_heads, len(mean) // self.kv_heads, -1)
        return {
            "query": ahead.reshape(groups).mean(axis=1).astype(np.float32),
            "spread": spread.reshape(groups).mean(axis=1).astype(np.float32),
            "pairs": self.rotation.pairs,
            "frequency": self.rotation.frequency,
        }

    def _in_planes(self, vectors: Array) -> Array:
        """Return the lengths of `vectors` (..., size) in the planes, (..., planes)."""
        sides = (vectors[..., self.rotation.pairs[:, side]] for side in (0, 1))
        return np.hypot(next(sides), next(sides))
