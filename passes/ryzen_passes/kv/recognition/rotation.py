"""Rotations: how positions enter the keys of a decoder (RoPE, arXiv 2104.09864), told by turning unit vectors.

Exporters spell a rotation in many ways: halves, neighbours, a part of each head, one operator, tables of angles. What stands
between a key before its rotation and the key that is cached depends on that key and on positions alone, so that it can be cut
out and run. Unit vectors turned by a few positions tell which elements pair up and how far a pair turns a position; random
vectors at far positions must then turn by that. What does not is no rotation: learned positions, frequencies that change with
the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import constant_tensor
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.kv.recognition.position_subgraph import ProbeError, evaluate
from ryzen_passes.kv.static.cache_view import StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX

Array = np.ndarray[Any, Any]

_FLOAT = ir.DataType.FLOAT
_MAX_UPSTREAM_TENSORS = 200
"""How many tensors back a rotation is looked for."""
_PROBE_OFFSETS = (1, 8, 64, 512, 4096)
"""Positions by which unit vectors are turned: each tells the angle of the next to less than half a turn."""
_FAR_POSITIONS = (32768, 1 << 18, 1 << 20)
"""Positions at which nothing may have changed."""
_LAYOUTS = {4: ((0, 1, 2, 3), (0, 2, 1, 3)), 3: ((0, 2, 1, 3),)}
"""Rank of keys before their rotation -> how (batch, kv_heads, seq, size) may lie in them; 3: heads and size are one axis."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How the keys of a head are turned: by `frequency` radians a position in each of its planes, and scaled.

    At position p element a of a pair (a, b) becomes a cos(p w) - b sin(p w), and b becomes b cos(p w) + a sin(p w), each times
    its scale; the other elements are scaled alone. So what was turned by p and is turned by n more has been turned by p + n.
    """

    unrotated_keys: ir.Value
    """The keys before the rotation: (batch, kv_heads, seq, size) transposed by `layout`, the last two axes one where it has 3
    axes."""
    layout: tuple[int, ...]
    pairs: Array
    """(planes, 2) int64: the elements that turn into each other."""
    frequency: Array
    """(planes,) float64: radians a position, above 0."""
    scale: Array
    """(size,) float64: 1 but where the exporter's angles, or its products, are scaled."""
    max_positions: int | None
    """How many positions there are, where a table of angles bounds them."""

    def same_as(self, other: Rotation) -> bool:
        """Whether keys turn alike."""
        return (
            np.array_equal(self.pairs, other.pairs)
            and np.allclose(self.frequency, other.frequency, rtol=1e-6, atol=1e-10)
            and np.allclose(self.scale, other.scale, rtol=1e-5, atol=0)
        )

    def rotate(self, keys: Array, positions: Array) -> Array:
        """Return `keys` (..., size) turned by `positions` (...), which broadcast, and not scaled; float64."""
        by, partner = self._signed_frequencies(), self._partner_indices()
        angle = np.asarray(positions, np.float64)[..., None] * by
        wide = np.asarray(keys, np.float64)
        moved: Array = wide * np.cos(angle) + wide[..., partner] * np.sin(angle)
        return moved

    def write_cos_sin(
        self, writer: NodeBuilder, before: ir.Node, positions: ir.Value, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Return what `turn` turns keys of `dtype` by: `positions` are integers that broadcast to (batch, heads, rows).

        Angles are float32, as exporters have them: at position p they are off by up to p * 6e-8 radians.
        """
        number = writer.op(before, "Cast", [positions], {"to": int(_FLOAT)}, dtype=_FLOAT, name_prefix=NODE_NAME_PREFIX)
        deep = writer.op(before, "Unsqueeze", [number, writer.int64_vector(3)], name_prefix=NODE_NAME_PREFIX)
        angle = writer.op(
            before,
            "Mul",
            [deep, writer.constant(self._signed_frequencies().astype(np.float32), _FLOAT)],
            name_prefix=NODE_NAME_PREFIX,
        )
        cos, sin = (writer.op(before, name, [angle], name_prefix=NODE_NAME_PREFIX) for name in ("Cos", "Sin"))
        if dtype == _FLOAT:
            return cos, sin
        narrow = (
            writer.op(before, "Cast", [one], {"to": int(dtype)}, dtype=dtype, name_prefix=NODE_NAME_PREFIX)
            for one in (cos, sin)
        )
        return next(narrow), next(narrow)

    def write_rotation(
        self, writer: NodeBuilder, before: ir.Node, keys: ir.Value, cos_sin: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Return `keys` (batch, heads, rows, size), which were turned and scaled before, turned by `angles` more."""
        cos, sin = cos_sin
        other = writer.op(
            before,
            "Gather",
            [keys, writer.int64_vector(*self._partner_indices().tolist())],
            {"axis": 3},
            name_prefix=NODE_NAME_PREFIX,
        )
        here, there = (writer.op(before, "Mul", pair, name_prefix=NODE_NAME_PREFIX) for pair in ([keys, cos], [other, sin]))
        return writer.op(before, "Add", [here, there], name_prefix=NODE_NAME_PREFIX)

    def _signed_frequencies(self) -> Array:
        """Return (size,): radians a position by which an element's partner turns into it; 0 where it has none."""
        by = np.zeros(len(self.scale))
        by[self.pairs[:, 0]], by[self.pairs[:, 1]] = -self.frequency, self.frequency
        return by

    def _partner_indices(self) -> Array:
        partner = np.arange(len(self.scale))
        partner[self.pairs[:, 0]], partner[self.pairs[:, 1]] = self.pairs[:, 1], self.pairs[:, 0]
        return partner


def recognize_rotation(view: StaticCacheView, value: ir.Value, heads: int, size: int) -> Rotation | str:
    """Return how positions enter `value` (batch, heads, seq, size), keys or queries of `form`, or why that is no rotation."""
    why: list[str] = []
    for pre in _upstream(value):
        nodes = _subgraph_between(view, pre, value)
        if nodes is None:
            continue
        for layout in _LAYOUTS.get(len(pre.shape) if pre.shape is not None else 0, ()):
            cut = _RotationSubgraph(view, value, nodes, pre, layout, heads, size)
            try:
                found = cut.measure()
            except ProbeError:
                continue
            if isinstance(found, Rotation):
                return found
            why.append(found)
    return ": ".join([f"positions do not enter `{value.name}` by a rotation", *why[:1]])


def _upstream(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the tensors that `value` is made of, the nearest first."""
    waiting, seen = [value], {value}
    for _ in range(_MAX_UPSTREAM_TENSORS):
        if not waiting:
            return
        node = waiting.pop(0).producer()
        for one in node.inputs if node is not None else ():
            if one is not None and one not in seen and constant_tensor(one) is None:
                seen.add(one)
                waiting.append(one)
                yield one


def _subgraph_between(view: StaticCacheView, source: ir.Value, value: ir.Value) -> list[ir.Node] | None:
    """Return what makes `value` of `pre` and positions, in the graph's order; None where it needs more, or no positions."""
    nodes: dict[ir.Node, None] = {}
    waiting, seen, timed = [value], {value, source, view.positions}, False
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.domain != "" or any(one.type == ir.AttributeType.GRAPH for one in node.attributes.values()):
            return None
        nodes[node] = None
        if _has_known_shape(view, node):
            continue
        timed |= view.positions in node.inputs
        for one in node.inputs:
            if one is not None and one not in seen and constant_tensor(one) is None:
                seen.add(one)
                waiting.append(one)
    return [node for node in view.model.graph if node in nodes] if timed and source is not view.positions else None


def _has_known_shape(view: StaticCacheView, node: ir.Node) -> bool:
    """Whether `node` tells a shape that is known but for the batch and the tokens of the step."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    return (
        source is not None
        and source.shape is not None
        and all(isinstance(dim, int) or dim in (view.batch, view.seq) for dim in source.shape)
    )


class _RotationSubgraph:
    """The nodes between a key before its rotation and the key that is cached."""

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
        """Return the rotation, or why it is none; raises Unknown where the nodes do not run so."""
        at_zero = self._rotation_matrix(0)
        scale = np.diag(at_zero)
        if np.abs(at_zero - np.diag(scale)).max() > 16 * self.epsilon or not scale.all():
            return "at position 0 it leaves no key where it was"
        longest = self._probe_max_positions()
        turns = [by for by in _PROBE_OFFSETS if longest is None or by < longest]
        matrices = {by: self._rotation_matrix(by) / scale for by in turns}
        pairs = self._find_pairs(matrices)
        if isinstance(pairs, str):
            return pairs
        frequency = np.zeros(len(pairs))
        one, two = pairs.T
        for by, matrix in matrices.items():
            angle = np.arctan2(matrix[two, one], matrix[one, one])
            frequency += np.angle(np.exp(1j * (angle - by * frequency))) / by
        turning = frequency != 0
        pairs, frequency = pairs[turning], frequency[turning]
        pairs[frequency < 0] = pairs[frequency < 0, ::-1]
        found = Rotation(self.unrotated_keys, self.layout, pairs, np.abs(frequency), scale, longest)
        return self._find_mismatch(found) or found

    def _find_pairs(self, matrices: dict[int, Array]) -> Array | str:
        """Return the elements (planes, 2) that turn into each other."""
        mixed = sum(np.abs(matrix - np.diag(np.diag(matrix))) for matrix in matrices.values())
        beside = np.asarray(mixed) > 4 * self.epsilon
        if (beside.sum(axis=0) > 1).any() or (beside != beside.T).any():
            return "its elements do not turn in pairs"
        pairs: Array = np.argwhere(np.triu(beside))
        return pairs if len(pairs) else "it turns nothing"

    def _find_mismatch(self, rotation: Rotation) -> str | None:
        """Return where random keys are not turned as `found` says."""
        random = np.random.default_rng(0)
        for far in (*_PROBE_OFFSETS, *_FAR_POSITIONS):
            if rotation.max_positions is not None and far >= rotation.max_positions:
                break
            keys = random.uniform(-1, 1, (self.batch, self.heads, self.seq, self.size)).astype(self.dtype)
            positions = random.integers(0, far + 1, (self.batch, self.seq))
            positions.flat[0] = far
            expected = rotation.rotate(keys.astype(np.float64) * rotation.scale, positions[:, None])
            allowed = (16 * self.epsilon + far * 2.0**-22) * np.abs(rotation.scale).max()
            if not np.abs(self.run(keys, positions) - expected).max() <= allowed:
                return f"by {far} positions it turns keys otherwise than {far} times by one"
        return None

    def _rotation_matrix(self, position: int) -> Array:
        """Return (size, size) float64: column n is unit vector n, at position `by`."""
        rows = self.batch * self.heads * self.seq
        matrix = np.zeros((self.size, self.size))
        for start in range(0, self.size, rows):
            keys = np.zeros((rows, self.size), self.dtype)
            count = min(rows, self.size - start)
            keys[np.arange(count), start + np.arange(count)] = 1
            shaped = keys.reshape(self.batch, self.heads, self.seq, self.size)
            found = self.run(shaped, np.full((self.batch, self.seq), position))
            matrix[:, start : start + count] = found.reshape(rows, self.size)[:count].T
        return matrix

    def _probe_max_positions(self) -> int | None:
        """Return how many positions there are; None: any."""

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
        """Return float64 (batch, heads, seq, size): `keys` of that shape turned by `positions` (batch, seq); raises Unknown."""
        laid = keys.transpose(self.layout)
        if self.unrotated_keys.shape is not None and len(self.unrotated_keys.shape) == 3:
            laid = laid.reshape(*laid.shape[:2], -1)
        feeds = {self.unrotated_keys.name or "": laid, self.view.positions.name or "": positions.astype(np.int64)}
        weights: dict[str, onnx.TensorProto] = {}
        nodes = []
        for node in self.nodes:
            if _has_known_shape(self.view, node):
                feeds[node.outputs[0].name or ""] = self._evaluate_shape(node)
                continue
            nodes.append(node)
            for one in node.inputs:
                tensor = constant_tensor(one)
                if one is not None and tensor is not None:
                    weights[one.name or ""] = ir.to_proto(ir.tensor(tensor.numpy(), name=one.name))
        found = np.asarray(evaluate(self.view.model, self.value, nodes, weights, feeds), np.float64)
        if found.shape != keys.shape:
            raise ProbeError(f"`{self.value.name}` is of another shape")
        return found

    def _evaluate_shape(self, node: ir.Node) -> Array:
        source = node.inputs[0]
        assert source is not None
        assert source.shape is not None
        sizes = [dim if isinstance(dim, int) else self.batch if dim == self.view.batch else self.seq for dim in source.shape]
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        return np.array(sizes[start:end], np.int64)
