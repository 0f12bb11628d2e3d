"""Recognition of rotary position embeddings (RoPE, arXiv 2104.09864) by probing with unit vectors.

Exporters write RoPE in many forms: rotated halves, interleaved pairs, partial rotation of a head, a single operator, tables of
angles. The nodes between an unrotated key and the cached key depend only on that key and on positions, so they can be extracted
and run. Unit vectors, rotated by a few positions, determine which elements form pairs and the frequency of each pair. Random
vectors at distant positions must then match these frequencies. Learned positions, and frequencies that depend on the sequence
length, do not match and are not recognized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor, shape_slice
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_passes.kv.static.cache_view import StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX
from ryzen_passes.position_subgraph import ProbeError, evaluate

Array = np.ndarray[Any, Any]

_FLOAT = ir.DataType.FLOAT
_MAX_UPSTREAM_TENSORS = 200
"""Maximum number of upstream tensors that are examined as unrotated keys."""
_PROBE_OFFSETS = (1, 8, 64, 512, 4096)
"""Positions at which unit vectors are rotated: each determines the angle at the next to within half a revolution."""
_FAR_POSITIONS = (32768, 1 << 18, 1 << 20)
"""Distant positions at which the measured frequencies must still hold."""
_LAYOUTS = {4: ((0, 1, 2, 3), (0, 2, 1, 3)), 3: ((0, 2, 1, 3),)}
"""Rank of unrotated keys -> permutations of (batch, kv_heads, seq, head_size) to try; rank 3 merges the last two."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary embedding of the keys of a head: `frequency` radians per position for each pair of elements, and a scale.

    At position p, element a of a pair (a, b) with frequency w becomes a cos(p w) - b sin(p w), and b becomes
    b cos(p w) + a sin(p w), each times its scale; the other elements are only scaled. Rotations add up: a rotation by p
    followed by a rotation by n equals a rotation by p + n.
    """

    unrotated_keys: ir.Value
    """Keys before the rotation: (batch, kv_heads, seq, head_size) transposed by `layout`; with rank 3 the last two axes are
    merged."""
    layout: tuple[int, ...]
    pairs: Array
    """(planes, 2) int64: indices of the elements that are rotated together."""
    frequency: Array
    """(planes,) float64: radians per position, greater than 0."""
    scale: Array
    """(head_size,) float64: factor per element; 1 unless the model scales its cosines and sines."""
    max_positions: int | None
    """Number of positions if a table of angles limits them; None: unlimited."""

    def same_as(self, other: Rotation) -> bool:
        """Return whether `other` has the same pairs, and frequencies and scales that are equal within rounding."""
        return (
            np.array_equal(self.pairs, other.pairs)
            and np.allclose(self.frequency, other.frequency, rtol=1e-6, atol=1e-10)
            and np.allclose(self.scale, other.scale, rtol=1e-5, atol=0)
        )

    def rotate(self, keys: Array, positions: Array) -> Array:
        """Return `keys` (..., head_size) rotated by `positions` (...), which broadcast, without the scale; float64."""
        partner = self._partner_indices()
        angle = np.asarray(positions, np.float64)[..., None] * self._signed_frequencies()
        keys = np.asarray(keys, np.float64)
        rotated: Array = keys * np.cos(angle) + keys[..., partner] * np.sin(angle)
        return rotated

    def write_cos_sin(
        self, writer: NodeBuilder, before: ir.Node, positions: ir.Value, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Write nodes for the cosines and sines that `write_rotation` takes, and return both in `dtype`.

        `positions` are integers that broadcast to (batch, heads, rows). Angles are computed in float32, as in exported models:
        at position p the error is at most p * 6e-8 radians.
        """
        positions_fp32 = writer.op(before, "Cast", [positions], {"to": int(_FLOAT)}, dtype=_FLOAT, name_prefix=NODE_NAME_PREFIX)
        expanded = writer.op(before, "Unsqueeze", [positions_fp32, writer.int64_vector(3)], name_prefix=NODE_NAME_PREFIX)
        angle = writer.op(
            before,
            "Mul",
            [expanded, writer.constant(self._signed_frequencies().astype(np.float32), _FLOAT)],
            name_prefix=NODE_NAME_PREFIX,
        )
        cos, sin = (writer.op(before, name, [angle], name_prefix=NODE_NAME_PREFIX) for name in ("Cos", "Sin"))
        if dtype == _FLOAT:
            return cos, sin
        converted = (
            writer.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, name_prefix=NODE_NAME_PREFIX)
            for value in (cos, sin)
        )
        return next(converted), next(converted)

    def write_rotation(
        self, writer: NodeBuilder, before: ir.Node, keys: ir.Value, cos_sin: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Write nodes that rotate `keys` (batch, heads, rows, head_size) by `cos_sin`, without the scale.

        Keys that are already rotated are rotated further.
        """
        cos, sin = cos_sin
        partners = writer.op(
            before,
            "Gather",
            [keys, writer.int64_vector(*self._partner_indices().tolist())],
            {"axis": 3},
            name_prefix=NODE_NAME_PREFIX,
        )
        direct, crossed = (
            writer.op(before, "Mul", pair, name_prefix=NODE_NAME_PREFIX) for pair in ([keys, cos], [partners, sin])
        )
        return writer.op(before, "Add", [direct, crossed], name_prefix=NODE_NAME_PREFIX)

    def _signed_frequencies(self) -> Array:
        """Return (head_size,): radians per position, negative for the first element of a pair, 0 for elements without one."""
        frequencies = np.zeros(len(self.scale))
        frequencies[self.pairs[:, 0]], frequencies[self.pairs[:, 1]] = -self.frequency, self.frequency
        return frequencies

    def _partner_indices(self) -> Array:
        partner = np.arange(len(self.scale))
        partner[self.pairs[:, 0]], partner[self.pairs[:, 1]] = self.pairs[:, 1], self.pairs[:, 0]
        return partner


def recognize_rotation(view: StaticCacheView, value: ir.Value, heads: int, size: int) -> Rotation | str:
    """Return the rotation that is applied to `value` (batch, heads, seq, head_size), or the reason why there is none.

    `value` holds keys or queries of the decoder in `view`, with `heads` heads of `size` elements.
    """
    reasons: list[str] = []
    for source in _upstream(value):
        nodes = _subgraph_between(view, source, value)
        if nodes is None:
            continue
        for layout in _LAYOUTS.get(len(source.shape) if source.shape is not None else 0, ()):
            subgraph = _RotationSubgraph(view, value, nodes, source, layout, heads, size)
            try:
                result = subgraph.measure()
            except ProbeError:
                continue
            if isinstance(result, Rotation):
                return result
            reasons.append(result)
    return ": ".join([f"positions are not applied to `{value.name}` by a rotation", *reasons[:1]])


def _upstream(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the tensors that `value` is computed from, nearest first, without constants."""
    pending, visited = [value], {value}
    for _ in range(_MAX_UPSTREAM_TENSORS):
        if not pending:
            return
        node = pending.pop(0).producer()
        for operand in node.inputs if node is not None else ():
            if operand is not None and operand not in visited and constant_tensor(operand) is None:
                visited.add(operand)
                pending.append(operand)
                yield operand


def _subgraph_between(view: StaticCacheView, source: ir.Value, value: ir.Value) -> list[ir.Node] | None:
    """Return the nodes that compute `value` from `source` and positions only, in graph order.

    Returns None if they need other inputs or do not use positions.
    """
    nodes: dict[ir.Node, None] = {}
    pending, visited, uses_positions = [value], {value, source, view.positions}, False
    while pending:
        node = pending.pop().producer()
        if node is None or node.domain != "" or node_subgraphs(node):
            return None
        nodes[node] = None
        if _has_known_shape(view, node):
            continue
        uses_positions |= view.positions in node.inputs
        for operand in node.inputs:
            if operand is not None and operand not in visited and constant_tensor(operand) is None:
                visited.add(operand)
                pending.append(operand)
    return [node for node in view.model.graph if node in nodes] if uses_positions and source is not view.positions else None


def _has_known_shape(view: StaticCacheView, node: ir.Node) -> bool:
    """Return whether `node` is a Shape whose result depends at most on the batch size and the step length."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    return (
        source is not None
        and source.shape is not None
        and all(isinstance(dim, int) or dim in (view.batch, view.seq) for dim in source.shape)
    )


class _RotationSubgraph:
    """The nodes between unrotated keys and rotated keys, which can be run on their own."""

    def __init__(
        self,
        view: StaticCacheView,
        value: ir.Value,
        nodes: list[ir.Node],
        unrotated_keys: ir.Value,
        layout: tuple[int, ...],
        heads: int,
        size: int,
    ) -> None:
        self.view, self.value, self.nodes, self.unrotated_keys, self.layout = view, value, nodes, unrotated_keys, layout
        self.heads, self.size = heads, size
        self.dtype = (unrotated_keys.dtype or _FLOAT).numpy()
        self.seq = view.seq if isinstance(view.seq, int) else 3
        rows = heads * self.seq
        self.batch = view.batch if isinstance(view.batch, int) else -(-size // rows)
        self.epsilon = float(np.finfo(self.dtype).eps) if np.issubdtype(self.dtype, np.floating) else 2.0**-7

    def measure(self) -> Rotation | str:
        """Return the measured rotation, or the reason why there is none; raises ProbeError if the nodes cannot be run."""
        at_zero = self._rotation_matrix(0)
        scale = np.diag(at_zero)
        if np.abs(at_zero - np.diag(scale)).max() > 16 * self.epsilon or not scale.all():
            return "keys at position 0 are not a scaled copy of the unrotated keys"
        max_positions = self._probe_max_positions()
        offsets = [offset for offset in _PROBE_OFFSETS if max_positions is None or offset < max_positions]
        matrices = {offset: self._rotation_matrix(offset) / scale for offset in offsets}
        pairs = self._find_pairs(matrices)
        if isinstance(pairs, str):
            return pairs
        frequency = np.zeros(len(pairs))
        first, second = pairs.T
        for offset, matrix in matrices.items():
            angle = np.arctan2(matrix[second, first], matrix[first, first])
            frequency += np.angle(np.exp(1j * (angle - offset * frequency))) / offset
        is_rotated = frequency != 0
        pairs, frequency = pairs[is_rotated], frequency[is_rotated]
        pairs[frequency < 0] = pairs[frequency < 0, ::-1]
        rotation = Rotation(self.unrotated_keys, self.layout, pairs, np.abs(frequency), scale, max_positions)
        return self._find_mismatch(rotation) or rotation

    def _find_pairs(self, matrices: dict[int, Array]) -> Array | str:
        """Return the indices (planes, 2) of the elements that are rotated together, or the reason why there are none."""
        mixed = sum(np.abs(matrix - np.diag(np.diag(matrix))) for matrix in matrices.values())
        is_mixed = np.asarray(mixed) > 4 * self.epsilon
        if (is_mixed.sum(axis=0) > 1).any() or (is_mixed != is_mixed.T).any():
            return "elements are not rotated in pairs"
        pairs: Array = np.argwhere(np.triu(is_mixed))
        return pairs if len(pairs) else "no element is rotated"

    def _find_mismatch(self, rotation: Rotation) -> str | None:
        """Return the first position at which random keys do not match `rotation`, as a message; None if all match."""
        random = np.random.default_rng(0)
        for position in (*_PROBE_OFFSETS, *_FAR_POSITIONS):
            if rotation.max_positions is not None and position >= rotation.max_positions:
                break
            keys = random.uniform(-1, 1, (self.batch, self.heads, self.seq, self.size)).astype(self.dtype)
            positions = random.integers(0, position + 1, (self.batch, self.seq))
            positions.flat[0] = position
            expected = rotation.rotate(keys.astype(np.float64) * rotation.scale, positions[:, None])
            tolerance = (16 * self.epsilon + position * 2.0**-22) * np.abs(rotation.scale).max()
            if not np.abs(self.run(keys, positions) - expected).max() <= tolerance:
                return f"the RoPE frequency is not constant: offset {position} differs from {position} offsets of 1"
        return None

    def _rotation_matrix(self, position: int) -> Array:
        """Return (head_size, head_size) float64: column n is unit vector n, rotated to `position`."""
        rows = self.batch * self.heads * self.seq
        matrix = np.zeros((self.size, self.size))
        for start in range(0, self.size, rows):
            keys = np.zeros((rows, self.size), self.dtype)
            count = min(rows, self.size - start)
            keys[np.arange(count), start + np.arange(count)] = 1
            unit_vectors = keys.reshape(self.batch, self.heads, self.seq, self.size)
            rotated = self.run(unit_vectors, np.full((self.batch, self.seq), position))
            matrix[:, start : start + count] = rotated.reshape(rows, self.size)[:count].T
        return matrix

    def _probe_max_positions(self) -> int | None:
        """Return the number of positions that can be evaluated; None: unlimited."""

        def runs(position: int) -> bool:
            keys = np.ones((self.batch, self.heads, self.seq, self.size), self.dtype)
            try:
                self.run(keys, np.full((self.batch, self.seq), position))
            except ProbeError:
                return False
            return True

        if runs(_FAR_POSITIONS[-1]):
            return None
        low, high = 0, _FAR_POSITIONS[-1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if runs(middle) else (low, middle)
        return high

    def run(self, keys: Array, positions: Array) -> Array:
        """Return `keys` (batch, heads, seq, head_size) rotated to `positions` (batch, seq), as float64.

        Raises ProbeError if the nodes cannot be run.
        """
        source_keys = keys.transpose(self.layout)
        if self.unrotated_keys.shape is not None and len(self.unrotated_keys.shape) == 3:
            source_keys = source_keys.reshape(*source_keys.shape[:2], -1)
        feeds = {self.unrotated_keys.name or "": source_keys, self.view.positions.name or "": positions.astype(np.int64)}
        weights: dict[str, onnx.TensorProto] = {}
        nodes = []
        for node in self.nodes:
            if _has_known_shape(self.view, node):
                feeds[node.outputs[0].name or ""] = self._evaluate_shape(node)
                continue
            nodes.append(node)
            for operand in node.inputs:
                tensor = constant_tensor(operand)
                if operand is not None and tensor is not None:
                    weights[operand.name or ""] = ir.to_proto(ir.tensor(tensor.numpy(), name=operand.name))
        rotated = np.asarray(evaluate(self.view.model, self.value, nodes, weights, feeds), np.float64)
        if rotated.shape != keys.shape:
            raise ProbeError(f"`{self.value.name}` is {rotated.shape}, not {keys.shape}")
        return rotated

    def _evaluate_shape(self, node: ir.Node) -> Array:
        source = node.inputs[0]
        assert source is not None
        assert source.shape is not None
        sizes = [dim if isinstance(dim, int) else self.batch if dim == self.view.batch else self.seq for dim in source.shape]
        return np.array(sizes[shape_slice(node)], np.int64)
