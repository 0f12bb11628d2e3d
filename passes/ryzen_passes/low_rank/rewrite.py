"""Find matrices, approximate them by products of two smaller ones, and rewrite their readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.product_inputs import measure_product_inputs
from ryzen_passes.weight_sites import Read, WeightSite, find_weights

Array = np.ndarray[Any, np.dtype[Any]]

_DAMPING = 1e-6
"""The share of the mean of the diagonal that is added to second moments, so that they have a Cholesky factor."""
_MULTIPLE = 8
"""Ranks are rounded up to a multiple of this, for which products are efficient."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight (length, outputs), or transposed if `site.axis` is 1, that products read."""

    site: WeightSite

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of features that a product sums over, and the number of its outputs."""
        first, second = self.tensor.shape.numpy()
        return (first, second) if self.site.axis == 0 else (second, first)

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The weight."""
        tensor = self.site.weight.const_value
        if tensor is None:
            raise ValueError(f"{self.site.weight.name} is not an initializer")
        return tensor

    def values(self) -> Array:
        """Return the weight as (length, outputs) float64."""
        array = np.asarray(self.tensor.numpy()).astype(np.float64)
        return array if self.site.axis == 0 else array.T


def matrices(model: ir.Model, skip: Sequence[str]) -> Iterator[Matrix]:
    """Yield the matrices that MatMul and Gemm multiply rows of activations by, except those of nodes that match `skip`."""
    for site in find_weights(model):
        if not isinstance(site, WeightSite) or len(site.weight.shape or ()) != 2:
            continue
        names = [name for read in site.reads for name in (read.node.name or "", read.node.op_type)]
        if any(fnmatchcase(name, pattern) for pattern in skip for name in names):
            continue
        if all(read.kind == "product" and read.node.op_type in ("MatMul", "Gemm") and read.activations for read in site.reads):
            yield Matrix(site=site)


def saved_bytes(matrix: Matrix, rank: int) -> int:
    """Return the bytes by which two factors of this rank are smaller than the matrix; 0 if they are not."""
    length, outputs = matrix.sizes
    return max(0, (length * outputs - rank * (length + outputs)) * matrix.tensor.dtype.bitwidth // 8)


def factorize(
    model: ir.Model, context: PassContext, *, rank: int, energy: float, whiten: bool, skip: Sequence[str]
) -> Change | Refusal:
    """Factorize the matrices of `model` in place; the options are those of LowRank."""
    found = list(matrices(model, skip))
    moments: dict[str, Array] = {}
    if whiten and found:
        measured = measure_product_inputs(model, [matrix.site for matrix in found], context, alternative="whiten=false")
        if isinstance(measured, Refusal):
            return measured
        moments = measured
    builder = NodeBuilder(model.graph, ModelInfo(model))
    notes, changed, before, saved = [], [], 0, 0
    for matrix in found:
        weight = matrix.site.weight
        values = matrix.values()
        if not np.isfinite(values).all():
            notes.append(f"{weight.name}: it has an element that is not finite")
            continue
        first, second = _factors(values, moments.get(str(weight.name)), rank, energy)
        if not (gain := saved_bytes(matrix, first.shape[1])):
            notes.append(f"{weight.name}: factors of rank {first.shape[1]} are not smaller")
            continue
        notes.append(f"{weight.name}: rank {first.shape[1]} of {min(values.shape)}")
        before, saved = before + matrix.tensor.nbytes, saved + gain
        dtype = matrix.tensor.dtype
        factors = [builder.constant(factor, dtype) for factor in (first, second)]
        for read in matrix.site.reads:
            changed.append(read.node.name or read.node.op_type)
            _multiply_by_factors(builder, read, factors, dtype)
        del model.graph.initializers[weight.name]  # type: ignore[arg-type]
    if not changed:
        return Refusal(
            reason="no matrix becomes smaller" + (f": {notes[0]}" if notes else ": it has none"),
            location=model.graph.name or "the graph",
            hint="choose a lower rank or energy" if notes else None,
        )
    return Change(
        inserted=tuple(builder.inserted),
        changed=tuple(changed),
        summary=f"{len({*changed})} products of matrices of {before / 1e6:.1f} MB, which become {saved / before:.0%} smaller",
        notes=tuple(notes),
    )


def _factors(values: Array, second_moments: Array | None, rank: int, energy: float) -> tuple[Array, Array]:
    """Return A (length, k) and B (k, outputs), whose product approximates `values` as LowRank describes."""
    factor = None
    if second_moments is not None:
        moments = second_moments.copy()
        np.einsum("ii->i", moments)[:] += _DAMPING * (float(np.trace(moments)) / len(moments) or 1.0)
        factor = np.linalg.cholesky(moments).T
    left, singular, right = np.linalg.svd(values if factor is None else factor @ values, full_matrices=False)
    kept = rank or len(singular)
    if energy:
        total = np.cumsum(singular**2)
        kept = min(kept, int(np.searchsorted(total, energy * total[-1]) + 1))
    kept = min(len(singular), -(-kept // _MULTIPLE) * _MULTIPLE if energy else kept)
    first = left[:, :kept] if factor is None else np.linalg.solve(factor, left[:, :kept])
    balance = np.sqrt(singular[:kept])
    return first * balance, balance[:, None] * right[:kept]


def _multiply_by_factors(builder: NodeBuilder, read: Read, factors: Sequence[ir.Value], dtype: ir.DataType) -> None:
    """Let a MatMul or Gemm multiply by the second factor what the first one yields."""
    node = read.node
    hidden = builder.op(node, "MatMul", [node.inputs[0], factors[0]], dtype=dtype)
    node.replace_input_with(0, hidden)
    second = factors[1]
    if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    node.replace_input_with(1, second)
