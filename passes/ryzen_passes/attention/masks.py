"""Masks: what is added to the scores of an attention, and which of its rows see no key at all."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import Sizes, constant
from ryzen_compile.ir.edit.builder import Writer

_CARRIES_VALUES = {"Expand", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Transpose", "Flatten", "Cast"}
_MOST_READ = 2**20
"""The most elements of a constant mask that is looked through."""


@dataclass(frozen=True)
class Mask:
    """One term of a mask."""

    value: ir.Value
    """What is added to the scores; or, with `fill`, the condition under which a score is replaced."""
    fill: float | None = None
    """What stands where a score does not count."""
    keeps: bool = True
    """For a condition: whether it is True where the score counts."""

    @property
    def hides(self) -> bool:
        """Whether a row of which every score is masked is a row without keys, not one of equal scores."""
        return self.fill is not None and bool(np.isinf(self.fill))


def low(dtype: ir.DataType) -> float:
    """Return what is added to a score that does not count: half of the most negative number of the type.

    It swallows every score, so that a row of nothing else averages all values. ONNX Runtime's Attention takes the most
    negative number itself for minus infinity, and gives zero. Two of these can be added and stay finite.
    """
    return float(ml_dtypes.finfo(dtype.numpy()).min) / 2  # type: ignore[no-untyped-call]


class Masks:
    """Writes the masks of one graph; masks that several attentions share are written once."""

    def __init__(self, write: Writer, sizes: Sizes) -> None:
        self.write, self.sizes = write, sizes
        self._written: dict[tuple[object, ...], ir.Value | None] = {}

    def condition(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value:
        """Return where a score counts by all of `masks`, which are conditions: a bool tensor of two axes or more."""
        key = ("condition", *masks)
        if key not in self._written:
            both: ir.Value | None = None
            for mask in masks:
                value = mask.value if mask.keeps else self.write.op(before, "Not", [mask.value], shape=mask.value.shape)
                value = self._wide(value, mask.value, before)
                both = value if both is None else self.write.op(before, "And", [both, value])
            self._written[key] = both
        return _there(self._written[key])

    def added(self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node, *, fill: float | None = None) -> ir.Value:
        """Return what `masks` come to as one tensor of `dtype` that is added to the scores.

        Where conditions hide a score stands `fill`, or the conditions' own: minus infinity or `low`.
        """
        key = ("added", dtype, fill, *masks)
        if key not in self._written:
            total: ir.Value | None = None
            for mask in masks:
                if mask.fill is None:
                    term = self._term(mask.value, dtype, before)
                    total = term if total is None else self.write.op(before, "Add", [total, term])
            conditions = tuple(mask for mask in masks if mask.fill is not None)
            if conditions:
                own = -np.inf if any(mask.hides for mask in conditions) else low(dtype)
                out = self.write.number(own if fill is None else fill, dtype)
                counts = self.condition(conditions, before)
                rest = self.write.number(0.0, dtype) if total is None else total
                shape = counts.shape if total is None else None
                total = self.write.op(before, "Where", [counts, rest, out], dtype=dtype, shape=shape)
            self._written[key] = total
        return _there(self._written[key])

    def finite(self, masks: tuple[Mask, ...], dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `added`, with `low` in the place of minus infinity."""
        added = self.added(masks, dtype, before, fill=low(dtype))
        if all(mask.fill is not None or self.is_finite(mask.value) for mask in masks):
            return added
        return self._bounded(added, dtype, before)

    def for_rows_of(self, query: ir.Value, mask: ir.Value, before: ir.Node) -> ir.Value:
        """Return `mask` with a row for each row of `query`, whose last axes are (S, D).

        ONNX would repeat a single row, as a MatMul does; ONNX Runtime's Attention does not.
        """
        have, want = self.sizes.dims(mask), self.sizes.dims(query)
        if have is not None and want is not None and have[-2] == want[-2]:
            return mask
        key = ("rows", mask, want[-2] if want is not None else query)
        if key not in self._written:
            rows = self.write.op(before, "Shape", [query], {"start": -2, "end": -1}, dtype=ir.DataType.INT64)
            target = self.write.op(before, "Concat", [rows, self.write.integers(1)], {"axis": 0})
            self._written[key] = self.write.op(before, "Expand", [mask, target])
        return _there(self._written[key])

    def visible(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        """Return which rows see a key, (B, H, S, 1), or None where all do."""
        hiding = tuple(mask for mask in masks if mask.hides or (mask.fill is None and not self.is_finite(mask.value)))
        if not hiding:
            return None
        key = ("visible", *hiding)
        if key not in self._written:
            seen: ir.Value | None = None
            for mask in hiding:
                if mask.fill is not None:
                    counts = self.condition((mask,), before)
                else:
                    gone = self.write.op(before, "IsInf", [mask.value], dtype=ir.DataType.BOOL)
                    counts = self._wide(self.write.op(before, "Not", [gone]), mask.value, before)
                seen = counts if seen is None else self.write.op(before, "And", [seen, counts])
            number = self.write.op(before, "Cast", [seen], {"to": int(ir.DataType.INT32)}, dtype=ir.DataType.INT32)
            most = self.write.op(before, "ReduceMax", [number, self.write.integers(-1)], {"keepdims": 1})
            self._written[key] = self.write.op(before, "Cast", [most], {"to": int(ir.DataType.BOOL)}, dtype=ir.DataType.BOOL)
        return self._written[key]

    def is_nothing(self, mask: Mask) -> bool:
        """Whether `mask` adds nothing, or hides nothing."""
        tensor = constant(mask.value)
        if tensor is None or tensor.size > _MOST_READ:
            return False
        return not tensor.numpy().any() if mask.fill is None else bool((tensor.numpy() == mask.keeps).all())

    def is_finite(self, value: ir.Value) -> bool:
        """Whether `value`, what is added to scores, is known to hold no infinity."""
        for _ in range(8):
            tensor, node = constant(value), value.producer()
            if tensor is not None:
                return tensor.size <= _MOST_READ and bool(np.isfinite(tensor.numpy().astype(np.float64)).all())
            if node is None or not node.inputs or node.inputs[0] is None:
                return False
            if node.op_type == "Where":
                return all(np.isfinite(_number(one)) for one in node.inputs[1:])
            if node.op_type == "Max" and np.isfinite(max(map(_number, node.inputs))):
                return True
            if node.op_type not in _CARRIES_VALUES:
                return False
            value = node.inputs[0]
        return False

    def _term(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `value`, which is added to scores, as `dtype`, with no number in it that could be taken for an infinity."""
        own, source = self.write.types.get(value, dtype), value
        if own != dtype or self.is_finite(value):
            value = self._bounded(value, dtype, before)
        if own != dtype:
            value = self.write.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, shape=value.shape)
        return self._wide(value, source, before)

    def _bounded(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return `value` with nothing below `low` of `dtype`."""
        node, key = value.producer(), ("bounded", dtype, value)
        if node is not None and node.op_type == "Max" and max(map(_number, node.inputs)) >= low(dtype):
            return value
        if key not in self._written:
            bound = self.write.number(low(dtype), self.write.types.get(value, dtype))
            self._written[key] = self.write.op(before, "Max", [value, bound], shape=value.shape)
        return _there(self._written[key])

    def _wide(self, value: ir.Value, source: ir.Value, before: ir.Node) -> ir.Value:
        """Return `value`, which has the axes of `source`, with at least two axes."""
        rank = self.sizes.rank(source)
        if rank is None or rank >= 2:
            return value
        return self.write.op(before, "Unsqueeze", [value, self.write.integers(*range(2 - rank))])


def _number(value: ir.Value | None) -> float:
    """Return the number that `value` always is; minus infinity where it is none."""
    tensor = constant(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else -np.inf


def _there(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("no mask was given")
    return value
