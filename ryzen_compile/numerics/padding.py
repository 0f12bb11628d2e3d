"""Padding in a comparison: which elements of an output belong to padding tokens, and whether the baseline confirms it.

Elements of padding tokens are left out of every measure, and nothing else is. That requires three things: the interface states
which value of a mask marks padding, an output has one entry per token of the mask by its declared dims, and the baseline
confirms the value on one row: a change of a token that the mask marks as padding changes no other token, and the same change
of the same token marked as valid changes some. Otherwise every element counts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec.dims import dim_names, dim_terms

if TYPE_CHECKING:
    from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, Outputs, TensorSpec

Array = np.ndarray[Any, Any]

_UNCHANGED = 1e-6
"""The largest change, relative to the largest magnitude of an output, that counts as none."""
_CHECKED_TOKENS = 16
"""The number of tokens in which a change that a valid token makes is looked for first."""
_BLOCK_ELEMENTS = 1 << 18
"""The number of elements that are in memory as float64 at a time."""


class PaddingMasks:
    """The padding of the outputs of one comparison."""

    def __init__(self, interface: Interface) -> None:
        """Leave out nothing until `check` confirms a mask."""
        self.notes: list[str] = []
        """The masks by which nothing is left out, with the reasons."""
        self._interface = interface
        self._pending: dict[str, tuple[InputSpec, list[str]]] = {}
        """Mask -> the outputs with one entry per token of the mask, if they are not checked yet."""
        self._confirmed: dict[str, InputSpec] = {}
        """Output -> the mask that states its padding."""
        taken: set[str] = set()
        for mask in interface.inputs:
            outputs = [spec.name for spec in interface.outputs if spec.name not in taken and _is_per_token(spec, mask)]
            if not outputs:
                continue
            taken.update(outputs)
            if mask.is_padding_mask:
                self._pending[mask.name] = (mask, outputs)
            else:
                self.notes.append(
                    f"nothing is left out as padding by `{mask.name}`: the model does not show which value marks padding"
                )

    def is_pending(self, inputs: Inputs) -> bool:
        """Return whether `inputs` have padding by a mask that is not checked yet, in rows of several tokens."""
        return any(
            bool((inputs[name] == mask.padding_value).any()) and _token_count(self._interface, mask, inputs) > 1
            for name, (mask, _) in self._pending.items()
        )

    def check(self, inputs: Inputs, run: Callable[[Inputs], Outputs]) -> None:
        """Check the masks that are not checked yet.

        `inputs` are those of one row, or of a batch if the baseline takes no single row; `run` runs the baseline.
        """
        for name, (mask, outputs) in list(self._pending.items()):
            if _token_count(self._interface, mask, inputs) < 2:
                continue
            del self._pending[name]
            confirmed = _confirmed_outputs(self._interface, mask, frozenset(outputs), inputs, run)
            self._confirmed.update(dict.fromkeys(confirmed, mask))
            if others := ", ".join(f"`{output}`" for output in outputs if output not in confirmed):
                self.notes.append(
                    f"nothing of {others} is left out as padding by `{name}`: the baseline does not confirm on a sample that "
                    f"{mask.padding_value} marks padding"
                )

    def valid_elements(self, name: str, output: Array, inputs: Inputs) -> Array | None:
        """Return the tokens of an output that count, (rows, tokens) of bool, or None if all elements count.

        For a mask over past and new tokens, (rows, past+tokens), the last columns apply.
        """
        mask = self._confirmed.get(name)
        if mask is None or output.ndim < 2:
            return None
        rows, tokens = output.shape[:2]
        valid: Array = _rows_of(inputs[mask.name]) != mask.padding_value
        if valid.shape[0] != rows or valid.shape[1] < tokens:
            return None
        return valid[:, valid.shape[1] - tokens :]


def _rows_of(mask: Array) -> Array:
    """Return a padding mask as (rows, elements)."""
    return mask.reshape(mask.shape[0], mask.shape[-1])


def _is_per_token(spec: TensorSpec, mask: InputSpec) -> bool:
    """Return whether the first two dims of an output or input are declared like those of a mask, the last term of a sum.

    Static sizes match only for tensors with a third axis: (2, 3) may be anything, (2, 3, 64) is a vector per token.
    """
    if mask.role != "mask" or not mask.dims or len(mask.dims) < 2 or mask.dims[0] == mask.dims[-1] or spec.dims is None:
        return False
    if any(dim != 1 for dim in mask.dims[1:-1]) or len(spec.dims) < 2 or spec.dims[0] != mask.dims[0]:
        return False
    if isinstance(spec.dims[1], int):
        return spec.dims[1] == mask.dims[-1] and len(spec.dims) > 2
    return spec.dims[1] == mask.dims[-1] or dim_names(mask.dims[-1])[-1:] == (spec.dims[1],)


def _confirmed_outputs(
    interface: Interface, mask: InputSpec, outputs: Set[str], inputs: Inputs, run: Callable[[Inputs], Outputs]
) -> list[str]:
    """Return the outputs whose other tokens do not depend on a token that `mask` marks as padding, but on a valid one.

    The first is checked on all tokens. The second needs one token that changes, which the first few contain in most models.
    """
    independent = outputs - _influenced_outputs(interface, mask, outputs, inputs, mask.padding_value, run)
    few_tokens = _first_tokens(interface, mask, inputs)
    try:
        dependent = _influenced_outputs(interface, mask, independent, few_tokens, mask.valid_value, run)
    except RyzenError:
        if few_tokens is inputs:
            raise
        dependent = frozenset()  # not every model takes fewer tokens, although it declares that it does
    if few_tokens is not inputs and dependent < independent:
        dependent |= _influenced_outputs(interface, mask, independent - dependent, inputs, mask.valid_value, run)
    return sorted(dependent)


def _influenced_outputs(
    interface: Interface,
    mask: InputSpec,
    outputs: Set[str],
    inputs: Inputs,
    value: int | None,
    run: Callable[[Inputs], Outputs],
) -> frozenset[str]:
    """Return the outputs with another token that a change of the first one influences, where the mask has `value`."""
    changed = {spec.name: array for spec in interface.inputs if (array := _with_another_token(spec, mask, inputs)) is not None}
    if not outputs or not changed:
        return frozenset()
    marked = np.full_like(inputs[mask.name], mask.valid_value)
    marked[..., inputs[mask.name].shape[-1] - _token_count(interface, mask, inputs)] = value
    before, after = (run({**inputs, mask.name: marked, **change}) for change in ({}, changed))
    return frozenset(name for name in outputs if name in before and _has_changed(before[name], after[name]))


def _first_tokens(interface: Interface, mask: InputSpec, inputs: Inputs) -> Inputs:
    """Return `inputs` with their first `_CHECKED_TOKENS` tokens; unchanged if the declared dims do not show how to cut them."""
    tokens, name = _token_count(interface, mask, inputs), dim_terms((mask.dims or (0,))[-1])[-1]
    if (
        tokens <= _CHECKED_TOKENS
        or isinstance(name, int)
        or not all(_can_be_cut(spec, name, inputs) for spec in interface.inputs)
    ):
        return inputs
    cut = {}
    for spec in interface.inputs:
        array = inputs[spec.name]
        for axis, dim in enumerate(spec.dims or ()):
            removed = (tokens - _CHECKED_TOKENS) * dim_terms(dim).count(name)
            array = array[(slice(None),) * axis + (slice(array.shape[axis] - removed),)]
        cut[spec.name] = array
    return cut


def _can_be_cut(spec: InputSpec, name: str, inputs: Inputs) -> bool:
    """Return whether the dims of an input show how many of its elements belong to each token of the dim `name`."""
    if spec.dims is None or spec.role == "lengths" or not isinstance(inputs[spec.name], np.ndarray):
        return False
    return all(isinstance(dim, int) or name in dim_terms(dim) or name not in re.findall(r"\w+", dim) for dim in spec.dims)


def _token_count(interface: Interface, mask: InputSpec, inputs: Inputs) -> int:
    """Return the number of tokens in a row of the inputs that `mask` covers, without those of the past; 0 if there are none."""
    return min((inputs[spec.name].shape[1] for spec in interface.inputs if _has_tokens(spec, mask)), default=0)


def _has_tokens(spec: InputSpec, mask: InputSpec) -> bool:
    return spec.role in ("values", "ids") and (_is_per_token(spec, mask) or spec.dims == mask.dims)


def _with_another_token(spec: InputSpec, mask: InputSpec, inputs: Inputs) -> Array | None:
    """Return an input with another first token in each row, or None if it has no tokens or only one possible value."""
    array = inputs[spec.name]
    if not _has_tokens(spec, mask) or spec.dtype == "string" or array.dtype.kind == "c":
        return None
    changed = array.copy()
    if spec.dtype == "bool":
        changed[:, 0] = ~array[:, 0]
    elif array.dtype.kind in "iu":
        low = 0 if spec.low is None else int(spec.low)
        high = low + 1 if spec.high is None else int(spec.high)
        if high <= low:
            return None
        changed[:, 0] = low + (array[:, 0].astype(np.int64) - low + (high - low + 1) // 2) % (high - low + 1)
    else:
        changed[:, 0] = (1.0 - array[:, 0].astype(np.float64)).astype(array.dtype)
    return changed


def _has_changed(before: Array, after: Array) -> bool:
    """Return whether any token but the first differs in two outputs, (rows, tokens, ...)."""
    if before.shape != after.shape or before.dtype.kind in "OUScb":
        return not np.array_equal(before[:, 1:], after[:, 1:])
    scale, largest = 1e-30, 0.0
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(before.shape[2:])))
    for row, start in itertools.product(range(before.shape[0]), range(1, before.shape[1], step)):
        left, right = (array[row, start : start + step].astype(np.float64) for array in (before, after))
        finite = np.isfinite(left) & np.isfinite(right)
        if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
            return True
        scale = max(scale, float(np.abs(left[finite]).max(initial=0.0)))
        largest = max(largest, float(np.abs(left[finite] - right[finite]).max(initial=0.0)))
    return largest > _UNCHANGED * scale
