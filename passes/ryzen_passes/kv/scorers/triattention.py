"""triattention: the attention that the mean query of the head gives to the key, from positions after the current one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.recognition.rotation import Rotation, recognize_rotation
from ryzen_passes.kv.scoring import (
    Estimator,
    Scorer,
    ScoringContext,
    StaticCacheLayer,
    StaticCacheView,
    Statistics,
    TorchScorer,
)
from ryzen_passes.kv.scoring.scorer import FLOAT, OTHER_SCORE_HINT

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

_QUERY_DISTANCES = tuple(2**power for power in range(17))
"""Distances in tokens from the step to the future queries that the score averages over: 1, 2, 4, ..., 65,536."""
_MIN_TOKENS = 256


class _TorchTriAttention(TorchScorer):
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._score_from_positions(keys, positions[0])

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        import torch

        return self._score_from_positions(keys, torch.tensor([seen_tokens], device=keys.device))

    def _score_from_positions(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores relative to querying positions (rows,), or (1,) for all rows."""
        import torch

        statistics = {name: tensor.to(keys.device) for name, tensor in self.statistics.items()}
        query, spread = statistics["query"][:, None], statistics["spread"][:, None]
        angle, (first, second) = positions.float()[:, None] * statistics["frequency"], statistics["pairs"].long().T
        rotated = query.repeat(1, len(positions), 1)
        rotated[..., first] = query[..., first] * angle.cos() - query[..., second] * angle.sin()
        rotated[..., second] = query[..., second] * angle.cos() + query[..., first] * angle.sin()
        keys_fp32 = keys.float()
        norms = torch.hypot(keys_fp32[..., first], keys_fp32[..., second])
        return (keys_fp32 * rotated).sum(dim=-1) + (norms * spread).sum(dim=-1)


class TriAttentionScorer(Scorer):
    """Score: mean over distances d of sum over planes f of Re[q_f conj(k_f) e^(i w_f (t + d))], plus sum over f of |k_f| r_f.

    A plane f is a pair of elements that RoPE rotates together, read as a complex number. q_f is the mean query of the group
    before rotation, and r_f = E|q_f| - |E q_f| the spread of queries around it; both are calibrated. k_f is the cached key, w_f
    the RoPE frequency in radians per position, and t the position of the step. Averaged over the distances, the first term is
    one product of the key with a vector that is rotated to t.

    TriAttention: Efficient Long Reasoning with Trigonometric KV Compression, arXiv 2604.04921. The mean is that over distances.
    """

    name: ClassVar[str] = "triattention"
    description: ClassVar[str] = "keeps keys that the mean query of the head would attend to"
    paper: ClassVar[str] = "TriAttention 2026, arXiv 2604.04921, averaged over distances"
    time_dependent: ClassVar[bool] = True
    torch_form: ClassVar[type[TorchScorer]] = _TorchTriAttention
    statistics_names: ClassVar[tuple[str, ...]] = ("query", "spread", "pairs", "frequency")

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context)
        self._next_layer = 0

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return a message if a layer has no rotation, or another one than in `statistics`, else None."""
        rotations = _find_rotations(view)
        if isinstance(rotations, str) or statistics is None:
            return rotations if isinstance(rotations, str) else None
        is_same = all(
            np.array_equal(statistics.tensor(index, "pairs"), rotation.pairs)
            and np.allclose(statistics.tensor(index, "frequency"), rotation.frequency, rtol=1e-5)
            for index, rotation in enumerate(rotations)
        )
        return None if is_same else "the RoPE frequencies of the keys differ from those in the statistics"

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return the query statistics of each layer; raises ModelError if a layer has no rotation."""
        rotations = _find_rotations(view)
        if isinstance(rotations, str):
            raise ModelError(rotations, hint=OTHER_SCORE_HINT)
        queries = [layer.attention.inputs[0] for layer in decoder.layers]
        names = [query.name or "" for query in queries if query is not None]
        return [
            _QueryStatistics((name,), layer.kv_heads, rotation)
            for name, layer, rotation in zip(names, decoder.layers, rotations, strict=True)
        ]

    def begin(self) -> None:
        """Write the mean query of each head, rotated to the position of the step."""
        context, rotations = self.context, _find_rotations(self.context.view)
        assert not isinstance(rotations, str)  # `problem` has refused it
        self._rotations = [rotations[layer_index] for layer_index in context.layer_indices]
        before = context.insertion_point
        positions = context.op(before, "Unsqueeze", [context.length, context.writer.int64_vector(1, 2)])
        rotated_queries = []
        layers = zip(context.layer_indices, self._rotations, strict=True)
        for rotation, neighbors in itertools.groupby(layers, key=lambda layer: layer[1]):
            query = np.concatenate([self._statistic(layer_index, "query") for layer_index, _ in neighbors])
            cos_sin = rotation.write_cos_sin(context.writer, before, positions, FLOAT)
            constant = context.writer.constant(query[None, :, None], FLOAT)
            rotated_queries.append(rotation.write_rotation(context.writer, before, constant, cos_sin))
        self._query = rotated_queries[0] if len(rotated_queries) == 1 else context.op(before, "Concat", rotated_queries, axis=1)
        spread = np.concatenate([self._statistic(layer_index, "spread") for layer_index in context.layer_indices])
        self._spread = context.writer.constant(spread[None, :, :, None], FLOAT)

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens, each relative to its own position."""
        context, layer_index = self.context, self.context.layer_indices[self._next_layer]
        rotation = self._rotations[self._next_layer]
        self._next_layer += 1
        positions = context.op(before, "Unsqueeze", [context.new_position, context.writer.int64_vector(1)])
        cos_sin = rotation.write_cos_sin(context.writer, before, positions, FLOAT)
        query = context.writer.constant(self._statistic(layer_index, "query")[None, :, None], FLOAT)
        rotated_query = rotation.write_rotation(context.writer, before, query, cos_sin)
        keys = context.to_float32(before, layer.key.update)
        product = context.op(
            before, "ReduceSum", [context.op(before, "Mul", [keys, rotated_query]), context.writer.int64_vector(3)], keepdims=0
        )
        spread = context.writer.constant(self._statistic(layer_index, "spread")[None, :, :, None], FLOAT)
        return context.op(before, "Add", [product, self._weighted_plane_norms(before, keys, spread)])

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores relative to the position of the step."""
        context, before = self.context, self.context.insertion_point
        column = context.op(before, "Transpose", [self._query], perm=[0, 1, 3, 2])
        product = context.op(before, "Squeeze", [context.op(before, "MatMul", [keys, column]), context.writer.int64_vector(3)])
        return context.op(before, "Add", [product, self._weighted_plane_norms(before, keys, self._spread)])

    def _statistic(self, layer_index: int, name: str) -> Array:
        assert self.context.statistics is not None
        return self.context.statistics.tensor(layer_index, name)

    def _weighted_plane_norms(self, before: ir.Node, keys: ir.Value, spread: ir.Value) -> ir.Value:
        """Return (batch, heads, rows): the norms of `keys` per rotation plane, weighted by `spread` (1, heads, planes, 1)."""
        context = self.context
        pairs = self._rotations[0].pairs
        plane_members = np.zeros((len(self._rotations[0].scale), len(pairs)), np.float32)
        for plane, pair in enumerate(pairs):
            plane_members[pair, plane] = 1.0
        squares = context.op(
            before, "MatMul", [context.op(before, "Mul", [keys, keys]), context.writer.constant(plane_members, FLOAT)]
        )
        return context.op(
            before,
            "Squeeze",
            [context.op(before, "MatMul", [context.op(before, "Sqrt", [squares]), spread]), context.writer.int64_vector(3)],
        )


def _find_rotations(view: StaticCacheView) -> list[Rotation] | str:
    """Return the rotation that each layer applies to its keys, one object for equal ones, or the reason why there is none.

    Layers may differ in their frequencies, as those with and without a window in Gemma 3 do, but not in the pairs.
    """
    rotations: list[Rotation] = []
    for layer in view.layers:
        rotation = recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.spec.key.head_size)
        if isinstance(rotation, str):
            return f"`{layer.spec.attention_node}`: {rotation}"
        if rotations and not np.array_equal(rotations[0].pairs, rotation.pairs):
            return f"`{layer.spec.attention_node}` rotates other pairs of elements than the first layer"
        rotations.append(next(filter(rotation.same_as, rotations), rotation))
    return rotations or "the decoder has no attention layer"


@dataclass
class _QueryStatistics:
    """Sums over the queries of one layer, rotated back to position 0."""

    tensor_names: tuple[str, ...]
    kv_heads: int
    rotation: Rotation
    count: int = 0
    query_sum: Array | float = 0.0
    """(heads, head_size)"""
    plane_norms: Array | float = 0.0
    """(heads, planes)"""

    @property
    def min_tokens(self) -> int:
        """Minimum number of tokens: 256."""
        return _MIN_TOKENS

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a document: queries (1, heads, seq, head_size)."""
        queries = self.rotation.rotate(tensors[0][0], -np.arange(tensors[0].shape[2]))
        self.count += queries.shape[1]
        self.query_sum = self.query_sum + queries.sum(axis=1)
        self.plane_norms = self.plane_norms + self._plane_norms(queries).sum(axis=1)

    def solve(self) -> Mapping[str, Array]:
        """Return `query` (kv_heads, head_size), averaged over distances, `spread` (kv_heads, planes), and the rotation.

        The rotation consists of `pairs` (planes, 2) and `frequency` (planes,) in radians per position.
        """
        mean = np.asarray(self.query_sum) / self.count
        spread = np.asarray(self.plane_norms) / self.count - self._plane_norms(mean)
        averaged = np.mean([self.rotation.rotate(mean, np.array(distance)) for distance in _QUERY_DISTANCES], axis=0)
        group_shape = (self.kv_heads, len(mean) // self.kv_heads, -1)
        return {
            "query": averaged.reshape(group_shape).mean(axis=1).astype(np.float32),
            "spread": spread.reshape(group_shape).mean(axis=1).astype(np.float32),
            "pairs": self.rotation.pairs,
            "frequency": self.rotation.frequency,
        }

    def _plane_norms(self, vectors: Array) -> Array:
        """Return the norms of `vectors` (..., head_size) in each rotation plane, (..., planes)."""
        pairs = self.rotation.pairs
        return np.hypot(vectors[..., pairs[:, 0]], vectors[..., pairs[:, 1]])
