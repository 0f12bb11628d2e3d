"""Caches of window size: a GroupQueryAttention with `sliding_window_cache` keeps the last tokens in buffers of a fixed length.

The op fills the first rows of its buffers. The rows after them are unspecified, according to its documentation in ONNX Runtime:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute

Array = np.ndarray[Any, Any]

WINDOW_ATTRIBUTE = "sliding_window_cache"
"""The attribute that is not 0 on a GroupQueryAttention with caches of window size."""
ROW_AXIS = 2
"""The axis of the rows of a cache, (batch, heads, rows, head size)."""
_PAST_INPUTS, _PRESENT_OUTPUTS, _SEQUENCE_LENGTHS = (3, 4), (1, 2), 5


@dataclass(frozen=True)
class WindowCaches:
    """The caches of one attention."""

    window: int
    """The tokens that a query attends to."""
    pasts: tuple[ir.Value, ...]
    presents: tuple[ir.Value, ...]
    lengths: ir.Value
    """The number of tokens of each row after the step, minus 1: (batch,)."""


def keeps_window(node: ir.Node) -> bool:
    """Return whether `node` is a GroupQueryAttention with caches of window size."""
    return node.op_type == "GroupQueryAttention" and int_attribute(node, WINDOW_ATTRIBUTE, 0) != 0


def find_window_caches(nodes: Sequence[ir.Node] | ir.Graph) -> list[WindowCaches]:
    """Return the caches of window size of `nodes`."""
    found = []
    for node in nodes:
        if not keeps_window(node) or len(node.inputs) <= _SEQUENCE_LENGTHS:
            continue
        lengths, window = node.inputs[_SEQUENCE_LENGTHS], int_attribute(node, "local_window_size", -1)
        pasts = tuple(value for index in _PAST_INPUTS if (value := node.inputs[index]) is not None)
        presents = tuple(node.outputs[index] for index in _PRESENT_OUTPUTS if index < len(node.outputs))
        if lengths is not None and window > 0:
            found.append(WindowCaches(window, pasts, presents, lengths))
    return found


def held_rows(tokens: Array, *, capacity: int, window: int) -> Array:
    """Return how many rows of a cache hold a token after `tokens` tokens, (batch,) integers of at least 1.

    A cache of `capacity` rows drops `capacity - window + 1` tokens at a time, when it is full.
    """
    dropped_at_once = capacity - window + 1
    drops = -(-(tokens - capacity) // dropped_at_once)
    rows: Array = np.where(tokens <= capacity, tokens, tokens - dropped_at_once * drops)
    return rows
