"""Masks: what is added to the scores of an attention, and which of its rows see no key at all."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import ShapeInference, constant_tensor
from ryzen_compile.ir.edit.builder import NodeBuilder

_VALUE_PRESERVING_OPS = {"Expand", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Transpose", "Flatten", "Cast"}
_MAX_MASK_ELEMENTS = 2**20
"""The most elements of a constant mask that is looked through."""


@dataclass(frozen=True)
class Mask:
    """One term of a mask."""

    value: ir.Value
    """What is added to the scores; or, with `fill`, the condition under which a score is replaced."""
    fill: float | None = None
    """What stands where a score does not count."""
    keep_if_true: bool = True
    """For a condition: whether it is True where the score counts."""

    @property
    def fills_with_inf(self) -> bool:
        """Whether a row of which every score is masked is a row without keys, not one of equal scores."""
        return self.fill is not None and bool(np.isinf(self.fill))


def finite_mask_value(dtype: ir.DataType) -> float:
    """Return what is added to a score that does not count: half of the most negative number of the type.

    It swallows every score, so that a row of nothing else averages all values. ONNX Runtime's Attention takes the most
    negative number itself for minus infinity, and gives zero. Two of these can be added and stay finite.
    """
    return float(ml_dtypes.finfo(dtype.numpy()).min) / 2  # type: ignore[no-untyped-call]


class MaskBuilder:
    """Writes the masks of one graph; masks that several attentions share are written once."""

    def __init__(self, writer: NodeBuilder, shapes: ShapeInference) -> None:
        self.writer, self.shapes = writer, shapes
        self._cached: dict[tuple[object, ...], ir.Value | None] = {}

    def boolean_mask(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value:
        """Return where a score counts by all of `masks`, which are conditions: a bool tensor of two axes or more."""
        key = ("condition", *masks)
        if key not in self._cached:
            both: ir.Value | None = None
            for mask in masks:
                value = mask.value if mask.keep_if_true else self.writer.op(before, "Not", [mask.value], shape=mask.value.shape)
                value = self._unsqueeze_to_2d(value, mask.value, before)
                both = value if both is None else self.writer.op(before, "And", [both, value])
            self._cached[key] = both
        return _require_mask(self._cached[key])

    def additive_mask(
        self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node, *, fill: float | None = None
    ) -> ir.Value:
        """Return what `masks` come to as one tensor of `dtype` that is added to the scores.

        Where conditions hide a score stands `fill`, or the conditions' own: minus infinity or `low`.
        """
        key = ("added", dtype, fill, *masks)
        if key not in self._cached:
            total: ir.Value | None = None
            for mask in masks:
                if mask.fill is None:
                    term = self._additive_term(mask.value, dtype, before)
                    total = term if total is None else self.writer.op(before, "Add", [total, term])
            conditions = tuple(mask for mask in masks if mask.fill is not None)
            if conditions:
                own = -np.inf if any(mask.fills_with_inf for mask in conditions) else finite_mask_value(dtype)
                out = self.writer.scalar(own if fill is None else fill, dtype)
                counts = self.boolean_mask(conditions, before)
                rest = self.writer.scalar(0.0, dtype) if total is None else total
                shape = counts.shape if total is None else None
                total = self.writer.op(before, "Where", [counts, rest, out], dtype=dtype, shape=shape)
            self._cached[key] = total
        return _require_mask(self._cached[key])

    def finite_additive_mask(self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `added`, with `low` in the place of minus infinity."""
        added = self.additive_mask(masks, dtype, before, fill=finite_mask_value(dtype))
        if all(mask.fill is not None or self.is_finite(mask.value) for mask in masks):
            return added
        return self._clamp_below(added, dtype, before)

    def expand_rows(self, query: ir.Value, mask: ir.Value, before: ir.Node) -> ir.Value:
        """Return `mask` with a row for each row of `query`, whose last axes are (S, D).

        ONNX would repeat a single row, as a MatMul does; ONNX Runtime's Attention does not.
        """
        have, want = self.shapes.dims(mask), self.shapes.dims(query)
        if have is not None and want is not None and have[-2] == want[-2]:
            return mask
        key = ("rows", mask, want[-2] if want is not None else query)
        if key not in self._cached:
            rows = self.writer.op(before, "Shape", [query], {"start": -2, "end": -1}, dtype=ir.DataType.INT64)
            target = self.writer.op(before, "Concat", [rows, self.writer.int64_vector(1)], {"axis": 0})
            self._cached[key] = self.writer.op(before, "Expand", [mask, target])
        return _require_mask(self._cached[key])

    def nonempty_rows(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        """Return which rows see a key, (B, H, S, 1), or None where all do."""
        hiding = tuple(mask for mask in masks if mask.fills_with_inf or (mask.fill is None and not self.is_finite(mask.value)))
        if not hiding:
            return None
        key = ("visible", *hiding)
        if key not in self._cached:
            seen: ir.Value | None = None
            for mask in hiding:
                if mask.fill is not None:
                    counts = self.boolean_mask((mask,), before)
                else:
                    gone = self.writer.op(before, "IsInf", [mask.value], dtype=ir.DataType.BOOL)
                    counts = self._unsqueeze_to_2d(self.writer.op(before, "Not", [gone]), mask.value, before)
                seen = counts if seen is None else self.writer.op(before, "And", [seen, counts])
            number = self.writer.op(before, "Cast", [seen], {"to": int(ir.DataType.INT32)}, dtype=ir.DataType.INT32)
            most = self.writer.op(before, "ReduceMax", [number, self.writer.int64_vector(-1)], {"keepdims": 1})
            self._cached[key] = self.writer.op(before, "Cast", [most], {"to": int(ir.DataType.BOOL)}, dtype=ir.DataType.BOOL)
        return self._cached[key]

    def is_noop(self, mask: Mask) -> bool:
        """Whether `mask` adds nothing, or hides nothing."""
        tensor = constant_tensor(mask.value)
        if tensor is None or tensor.size > _MAX_MASK_ELEMENTS:
            return False
        return not tensor.numpy().any() if mask.fill is None else bool((tensor.numpy() == mask.keep_if_true).all())

    def is_finite(self, value: ir.Value) -> bool:
        """Whether `value`, what is added to scores, is known to hold no infinity."""
        for _ in range(8):
            tensor, node = constant_tensor(value), value.producer()
            if tensor is not None:
                return tensor.size <= _MAX_MASK_ELEMENTS and bool(np.isfinite(tensor.numpy().astype(np.float64)).all())
            if node is None or not node.inputs or node.inputs[0] is None:
                return False
            if node.op_type == "Where":
                return all(np.isfinite(_scalar_or_neg_inf(one)) for one in node.inputs[1:])
            if node.op_type == "Max" and np.isfinite(max(map(_scalar_or_neg_inf, node.inputs))):
                return True
            if node.op_type not in _VALUE_PRESERVING_OPS:
                return False
            value = node.inputs[0]
        return False

    def _additive_term(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `value`, which is added to scores, as `dtype`, with no number in it that could be taken for an infinity."""
        own, source = self.writer.types.get(value, dtype), value
        if own != dtype or self.is_finite(value):
            value = self._clamp_below(value, dtype, before)
        if own != dtype:
            value = self.writer.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, shape=value.shape)
        return self._unsqueeze_to_2d(value, source, before)

    def _clamp_below(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `value` with nothing below `low` of `dtype`."""
        node, key = value.producer(), ("bounded", dtype, value)
        if node is not None and node.op_type == "Max" and max(map(_scalar_or_neg_inf, node.inputs)) >= finite_mask_value(dtype):
            return value
        if key not in self._cached:
            bound = self.writer.scalar(finite_mask_value(dtype), self.writer.types.get(value, dtype))
            self._cached[key] = self.writer.op(before, "Max", [value, bound], shape=value.shape)
        return _require_mask(self._cached[key])

    def _unsqueeze_to_2d(self, value: ir.Value, source: ir.Value, before: ir.Node) -> ir.Value:
        """Return `value`, which has the axes of `source`, with at least two axes."""
        rank = self.shapes.rank(source)
        if rank is None or rank >= 2:
            return value
        return self.writer.op(before, "Unsqueeze", [value, self.writer.int64_vector(*range(2 - rank))])


def _scalar_or_neg_inf(value: ir.Value | None) -> float:
    """Return the number that `value` always is; minus infinity where it is none."""
    tensor = constant_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else -np.inf


def _require_mask(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("no mask was given")
    return value
