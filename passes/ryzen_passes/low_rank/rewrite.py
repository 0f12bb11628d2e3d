"""Find matrices, approximate them by products of two smaller ones, and rewrite their readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.product_inputs import measure_product_inputs
from ryzen_passes.weight_sites import WeightRead, WeightSite, find_weights

Array = np.ndarray[Any, np.dtype[Any]]

_DAMPING = 1e-6
"""The share of the mean of the diagonal that is added to second moments, so that they have a Cholesky factor."""
_MULTIPLE = 8
"""Ranks are rounded up to a multiple of this, for which products are efficient."""


def matrices(model: ir.Model, skip: Sequence[str]) -> list[WeightSite]:
    """Return the matrices that MatMul and Gemm multiply rows of activations by, except those of nodes that match `skip`."""
    sites = [site for site in find_weights(model, skip) if isinstance(site, WeightSite) and site.is_product_matrix]
    return [site for site in sites if all(read.node.op_type != "Transpose" and read.activations for read in site.reads)]


def saved_bytes(site: WeightSite, rank: int) -> int:
    """Return the bytes by which two factors of this rank are smaller than the matrix; 0 if they are not."""
    length, outputs = site.length, site.tensor.size // site.length
    return max(0, (length * outputs - rank * (length + outputs)) * site.tensor.dtype.bitwidth // 8)


def _values(site: WeightSite) -> Array:
    """Return the matrix as (length, outputs) float64."""
    array = np.asarray(site.tensor.numpy()).astype(np.float64)
    return array if site.axis == 0 else array.T


def factorize(
    model: ir.Model, context: PassContext, *, rank: int, energy: float, whiten: bool, skip: Sequence[str]
) -> Change | Refusal:
    """Factorize the matrices of `model` in place; the options are those of LowRank."""
    found = matrices(model, skip)
    moments: dict[str, Array] = {}
    if whiten and found:
        measured = measure_product_inputs(model, found, context, alternative="whiten=false")
        if isinstance(measured, Refusal):
            return measured
        moments = measured
    builder = NodeBuilder(model.graph, ModelInfo(model))
    notes, changed, before, saved = [], [], 0, 0
    for site in found:
        weight, tensor = site.weight, site.tensor
        values = _values(site)
        if not np.isfinite(values).all():
            notes.append(f"{weight.name}: it has an element that is not finite")
            continue
        first, second = _factors(values, moments.get(str(weight.name)), rank, energy)
        if not (gain := saved_bytes(site, first.shape[1])):
            notes.append(f"{weight.name}: factors of rank {first.shape[1]} are not smaller")
            continue
        notes.append(f"{weight.name}: rank {first.shape[1]} of {min(values.shape)}")
        before, saved = before + tensor.nbytes, saved + gain
        factors = [builder.constant(factor, tensor.dtype) for factor in (first, second)]
        for read in site.reads:
            changed.append(read.node.name or read.node.op_type)
            _multiply_by_factors(builder, read, factors, tensor.dtype)
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


def _multiply_by_factors(builder: NodeBuilder, read: WeightRead, factors: Sequence[ir.Value], dtype: ir.DataType) -> None:
    """Let a MatMul or Gemm multiply by the second factor what the first one yields."""
    node = read.node
    hidden = builder.op(node, "MatMul", [node.inputs[0], factors[0]], dtype=dtype)
    node.replace_input_with(0, hidden)
    second = factors[1]
    if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    node.replace_input_with(1, second)
