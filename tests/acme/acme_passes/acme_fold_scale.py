"""acme-fold-scale: moves a constant factor behind a matrix product into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal


@dataclass(frozen=True, kw_only=True)
class FoldScale(Pass):
    """Replace `Mul(MatMul(x, weight), factor)` by `MatMul(x, weight * factor)`."""

    name: ClassVar[str] = "acme-fold-scale"

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the change of the number of nodes, without changing `model`."""
        return PassEstimate(nodes=-sum(_match(node) is not None for node in model.graph))

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite `model` in place and return what changed."""
        removed = []
        for mul in list(model.graph):
            if (scaled := _match(mul)) is None:
                continue
            scaled.weight.const_value = ir.tensor(scaled.new_weight, name=scaled.weight.name)
            ir.convenience.replace_all_uses_with(mul.outputs[0], scaled.product)
            model.graph.remove(mul, safe=True)
            removed.append(mul.name or "Mul")
        return Change(removed=tuple(removed), summary=f"factors folded into weights: {len(removed)}")


class _ScaledProduct(NamedTuple):
    """A matrix product that a Mul scales."""

    product: ir.Value
    weight: ir.Value
    new_weight: np.ndarray


def _match(mul: ir.Node) -> _ScaledProduct | None:
    """Return the matrix product that `mul` scales by a constant; None if it scales none."""
    if mul.op_type != "Mul" or mul.outputs[0].is_graph_output():
        return None
    for product, factor in (mul.inputs, mul.inputs[::-1]):
        constant = ir.convenience.get_const_tensor(factor) if factor is not None else None
        matmul = product.producer() if product is not None and len(product.uses()) == 1 else None
        if product is None or matmul is None or matmul.op_type != "MatMul" or constant is None or constant.size != 1:
            continue
        weight = matmul.inputs[1]
        if weight is not None and weight.is_initializer() and weight.const_value is not None and len(weight.uses()) == 1:
            return _ScaledProduct(product, weight, weight.const_value.numpy() * constant.numpy().item())
    return None
