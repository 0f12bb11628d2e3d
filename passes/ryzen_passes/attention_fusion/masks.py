"""Attention masks: build boolean masks, additive masks, and the mask of the rows that have a visible key."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_scalar, constant_tensor
from ryzen_compile.ir.analysis.op_traits import CONVERSION_OPS, LAYOUT_OPS
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import NodeBuilder

_VALUE_PRESERVING_OPS = LAYOUT_OPS | CONVERSION_OPS
_MAX_MASK_ELEMENTS = 2**20
"""The maximum element count of a constant mask whose values are inspected."""


@dataclass(frozen=True)
class Mask:
    """One term of a mask."""

    value: ir.Value
    """Without `fill`: the tensor that is added to the scores. With `fill`: the condition of a Where that masks scores."""
    fill: float | None = None
    """The value of a masked score."""
    keep_if_true: bool = True
    """For a condition: whether True keeps the score (else True masks it)."""

    @property
    def fills_with_inf(self) -> bool:
        """Whether a fully masked row has no visible key; with a finite fill it has equal scores instead."""
        return self.fill is not None and bool(np.isinf(self.fill))


def finite_mask_value(dtype: ir.DataType) -> float:
    """Return the finite additive value of a masked score: half of the most negative number of `dtype`.

    Rounding absorbs any score that is added to it, so a fully masked row averages all values. The Attention of ONNX Runtime
    treats the most negative number itself as minus infinity and returns zero for such a row. The sum of two is finite.
    """
    return float(ml_dtypes.finfo(dtype.numpy()).min) / 2  # type: ignore[no-untyped-call]


class MaskBuilder:
    """Builds the masks of one graph; a mask that several attentions share is built once."""

    def __init__(self, writer: NodeBuilder, shapes: ShapeInference) -> None:
        self.writer, self.shapes = writer, shapes
        self._cached: dict[tuple[object, ...], ir.Value | None] = {}

    def boolean_mask(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value:
        """Return the logical And of `masks`, which must all be conditions: bool, rank 2 or more, True keeps the score."""
        key = ("boolean", *masks)
        if key not in self._cached:
            combined: ir.Value | None = None
            for mask in masks:
                value = mask.value if mask.keep_if_true else self.writer.op(before, "Not", [mask.value], shape=mask.value.shape)
                value = self._unsqueeze_to_2d(value, mask.value, before)
                combined = value if combined is None else self.writer.op(before, "And", [combined, value])
            self._cached[key] = combined
        return _require_mask(self._cached[key])

    def additive_mask(
        self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node, *, infinite_fill: float = -np.inf
    ) -> ir.Value:
        """Return `masks` combined into one additive mask of type `dtype`.

        A score that a condition masks gets `infinite_fill` if the condition fills with minus infinity, else
        `finite_mask_value(dtype)`.
        """
        key = ("additive", dtype, infinite_fill, *masks)
        if key not in self._cached:
            total: ir.Value | None = None
            for mask in masks:
                if mask.fill is None:
                    term = self._additive_term(mask.value, dtype, before)
                    total = term if total is None else self.writer.op(before, "Add", [total, term])
            conditions = tuple(mask for mask in masks if mask.fill is not None)
            finite = tuple(mask for mask in conditions if not mask.fills_with_inf)
            infinite = tuple(mask for mask in conditions if mask.fills_with_inf)
            # Infinite last: they also mask a key that another condition masks with a finite value.
            for group, fill in ((finite, finite_mask_value(dtype)), (infinite, infinite_fill)):
                if group:
                    keep, masked_value = self.boolean_mask(group, before), self.writer.scalar(fill, dtype)
                    base = self.writer.scalar(0.0, dtype) if total is None else total
                    shape = keep.shape if total is None else None
                    total = self.writer.op(before, "Where", [keep, base, masked_value], dtype=dtype, shape=shape)
            self._cached[key] = total
        return _require_mask(self._cached[key])

    def attention_mask(self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return the additive mask of an ONNX Attention; on ONNX Runtime, the output of a fully masked row is as specified.

        No finite element is less than `finite_mask_value(dtype)`; minus infinity stays.
        """
        additive = self.additive_mask(masks, dtype, before)
        return additive if self._have_known_values(masks) else self._clamp_finite_below(additive, dtype, before)

    def finite_additive_mask(self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return the additive mask with finite numbers only.

        `finite_mask_value(dtype)` replaces minus infinity if all masks fill with it. Otherwise a lower number replaces it:
        a row without a visible key averages the values that are masked by finite numbers.
        """
        fill = finite_mask_value(dtype) * (1.0 if all(mask.fills_with_inf for mask in masks) else 1.5)
        if self._have_known_values(masks):
            return self.additive_mask(masks, dtype, before, infinite_fill=fill)
        return self._clamp_below(self.attention_mask(masks, dtype, before), dtype, before, fill)

    def _have_known_values(self, masks: tuple[Mask, ...]) -> bool:
        """Return whether every mask is a condition, or an additive mask that is known to be finite."""
        return all(mask.fill is not None or self.is_finite(mask.value) for mask in masks)

    def expand_rows(self, query: ir.Value, mask: ir.Value, before: ir.Node) -> ir.Value:
        """Return `mask` (..., 1 or S, N) expanded to one row per row of `query` (..., S, D).

        ONNX broadcasts a single row; the Attention of ONNX Runtime does not.
        """
        mask_dims, query_dims = self.shapes.dims(mask), self.shapes.dims(query)
        if mask_dims is not None and query_dims is not None and mask_dims[-2] == query_dims[-2]:
            return mask
        key = ("rows", mask, query_dims[-2] if query_dims is not None else query)
        if key not in self._cached:
            row_count = self.writer.op(before, "Shape", [query], {"start": -2, "end": -1}, dtype=ir.DataType.INT64)
            target = self.writer.op(before, "Concat", [row_count, self.writer.int64_vector(1)], {"axis": 0})
            self._cached[key] = self.writer.op(before, "Expand", [mask, target])
        return _require_mask(self._cached[key])

    def nonempty_rows(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        """Return the rows that have a visible key, (B, H, S, 1) bool; None if all rows have one."""
        hiding_masks = tuple(
            mask for mask in masks if mask.fills_with_inf or (mask.fill is None and not self.is_finite(mask.value))
        )
        if not hiding_masks:
            return None
        key = ("nonempty", *hiding_masks)
        if key not in self._cached:
            visible: ir.Value | None = None
            for mask in hiding_masks:
                if mask.fill is not None:
                    keep = self.boolean_mask((mask,), before)
                else:
                    is_inf = self.writer.op(before, "IsInf", [mask.value], dtype=ir.DataType.BOOL)
                    keep = self._unsqueeze_to_2d(self.writer.op(before, "Not", [is_inf]), mask.value, before)
                visible = keep if visible is None else self.writer.op(before, "And", [visible, keep])
            visible_int = self.writer.op(before, "Cast", [visible], {"to": int(ir.DataType.INT32)}, dtype=ir.DataType.INT32)
            any_visible = self.writer.op(before, "ReduceMax", [visible_int, self.writer.int64_vector(-1)], {"keepdims": 1})
            self._cached[key] = self.writer.op(
                before, "Cast", [any_visible], {"to": int(ir.DataType.BOOL)}, dtype=ir.DataType.BOOL
            )
        return self._cached[key]

    def is_noop(self, mask: Mask) -> bool:
        """Return whether `mask` is a constant that adds only zeros or masks no score."""
        tensor = constant_tensor(mask.value)
        if tensor is None or tensor.size > _MAX_MASK_ELEMENTS:
            return False
        return not tensor.numpy().any() if mask.fill is None else bool((tensor.numpy() == mask.keep_if_true).all())

    def is_finite(self, value: ir.Value) -> bool:
        """Return whether the additive mask `value` is known to have only finite elements."""
        for _ in range(8):
            tensor, node = constant_tensor(value), value.producer()
            if tensor is not None:
                return tensor.size <= _MAX_MASK_ELEMENTS and bool(np.isfinite(tensor.numpy().astype(np.float64)).all())
            if node is None or not node.inputs or node.inputs[0] is None:
                return False
            if node.op_type == "Where":
                return all(np.isfinite(_scalar_or_neg_inf(branch)) for branch in node.inputs[1:])
            if node.op_type == "Max" and np.isfinite(max(map(_scalar_or_neg_inf, node.inputs))):
                return True
            if node.op_type not in _VALUE_PRESERVING_OPS:
                return False
            value = node.inputs[0]
        return False

    def _additive_term(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return the additive mask `value` as `dtype`, in which no finite element becomes minus infinity.

        A mask that is known to be finite is clamped at `finite_mask_value(dtype)`.
        """
        value_dtype, source = self.writer.types.get(value, dtype), value
        if self.is_finite(value):
            value = self._clamp_below(value, dtype, before)
        elif value_dtype != dtype:
            value = self._clamp_finite_below(value, dtype, before)
        if value_dtype != dtype:
            value = self.writer.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, shape=value.shape)
        return self._unsqueeze_to_2d(value, source, before)

    def _clamp_below(self, value: ir.Value, dtype: ir.DataType, before: ir.Node, bound: float | None = None) -> ir.Value:
        """Return `value` clamped from below at `bound`, by default `finite_mask_value(dtype)`."""
        bound = finite_mask_value(dtype) if bound is None else bound
        if _is_clamped(value, bound):
            return value
        key = ("clamped", dtype, bound, value)
        if key not in self._cached:
            scalar = self.writer.scalar(bound, self.writer.types.get(value, dtype))
            self._cached[key] = self.writer.op(before, "Max", [value, scalar], shape=value.shape)
        return _require_mask(self._cached[key])

    def _clamp_finite_below(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `value` with finite elements clamped from below at `finite_mask_value(dtype)`, and infinities unchanged."""
        if _is_clamped_unless_inf(value, finite_mask_value(dtype)):
            return value
        key = ("finite elements clamped", dtype, value)
        if key not in self._cached:
            is_inf = self.writer.op(before, "IsInf", [value], dtype=ir.DataType.BOOL, shape=value.shape)
            clamped = self._clamp_below(value, dtype, before)
            value_dtype = self.writer.types.get(value, dtype)
            self._cached[key] = self.writer.op(before, "Where", [is_inf, value, clamped], dtype=value_dtype, shape=value.shape)
        return _require_mask(self._cached[key])

    def _unsqueeze_to_2d(self, value: ir.Value, source: ir.Value, before: ir.Node) -> ir.Value:
        """Return `value`, which has the rank of `source`, unsqueezed to rank 2 or more."""
        rank = self.shapes.rank(source)
        if rank is None or rank >= 2:
            return value
        return self.writer.op(before, "Unsqueeze", [value, self.writer.int64_vector(*range(2 - rank))])


def _is_clamped(value: ir.Value | None, bound: float) -> bool:
    """Return whether `value` is a Max with a constant scalar of at least `bound`."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Max" and max(map(_scalar_or_neg_inf, node.inputs)) >= bound


def _is_clamped_unless_inf(value: ir.Value, bound: float) -> bool:
    """Return whether `value` is Where(IsInf(x), x, y) with a `y` that is clamped from below at `bound`."""
    node = value.producer()
    if node is None or node.op_type != "Where" or not _is_clamped(node.inputs[2], bound):
        return False
    test = node.inputs[0].producer() if node.inputs[0] is not None else None
    return test is not None and test.op_type == "IsInf" and test.inputs[0] is node.inputs[1]


def _scalar_or_neg_inf(value: ir.Value | None) -> float:
    """Return the value of a constant scalar; minus infinity if `value` is not one."""
    scalar = constant_scalar(value)
    return -np.inf if scalar is None else scalar


def _require_mask(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("`masks` must not be empty")
    return value
