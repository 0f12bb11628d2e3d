"""square-by-mul: computes squares by Mul in place of Pow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal


@dataclass(frozen=True, kw_only=True)
class SquareByMul(Pass):
    """Replace `Pow(x, 2)` by `Mul(x, x)`."""

    name: ClassVar[str] = "square-by-mul"

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the change of the number of nodes, which is 0."""
        return PassEstimate(nodes=0)

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite `model` in place and return what changed."""
        squares = [node for node in model.graph if _is_square(node)]
        removed, inserted = [], []
        for number, node in enumerate(squares):
            product = ir.node("Mul", [node.inputs[0], node.inputs[0]], name=f"square-by-mul/{number}")
            product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [product], [node.outputs[0]], [product.outputs[0]]
            )
            removed.append(node.name or "Pow")
            inserted.append(product.name or "Mul")
        summary = f"squares computed by Mul: {len(squares)}"
        return Change(removed=tuple(removed), inserted=tuple(inserted), summary=summary)


def _is_square(node: ir.Node) -> bool:
    exponent = node.inputs[1] if node.op_type == "Pow" else None
    constant = ir.convenience.get_const_tensor(exponent) if exponent is not None else None
    return constant is not None and constant.size == 1 and float(constant.numpy().item()) == 2.0
