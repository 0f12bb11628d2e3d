"""Toy facts and passes on a small graph, to try the orchestrator on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property

TOY_GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
toy (float[N] x) => (float[N] y) { [a] h = Abs (x)  [b] y = Neg (h) }
"""


def toy_model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TOY_GRAPH))


def _contains_no(op_type: str) -> Property:
    def check(model: ir.Model) -> str | None:
        guilty = [node.name for node in model.graph if node.op_type == op_type]
        return f"`{guilty[0]}` is a {op_type}" if guilty else None

    return Property(f"no/{op_type.lower()}", f"there is no {op_type}", check)


NO_ABS = _contains_no("Abs")
NO_NEG = _contains_no("Neg")
NO_RELU = _contains_no("Relu")
PROPERTIES = frozenset({NO_ABS, NO_NEG, NO_RELU})


@dataclass(frozen=True, kw_only=True)
class ReplaceOpType(Pass):
    """Rename every node of one type to another: honest about it only as far as a subclass says."""

    name: ClassVar[str] = "swap"
    source_op: ClassVar[str] = "Abs"
    target_op: ClassVar[str] = "Relu"

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        return PassEstimate()

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        touched = [node for node in model.graph if node.op_type == self.source_op]
        for node in touched:
            node.op_type = self.target_op
        return Change(changed=tuple(node.name or "" for node in touched), summary=f"{len(touched)} swapped")


@dataclass(frozen=True, kw_only=True)
class AbsToRelu(ReplaceOpType):
    """Honest."""

    name: ClassVar[str] = "abs-to-relu"
    ensures: ClassVar[frozenset[Property]] = frozenset({NO_ABS})
    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})


@dataclass(frozen=True, kw_only=True)
class NeedsNoRelu(ReplaceOpType):
    """Wants to run before anything makes a Relu."""

    name: ClassVar[str] = "needs-no-relu"
    requires: ClassVar[frozenset[Property]] = frozenset({NO_RELU})
    source_op: ClassVar[str] = "Neg"
    target_op: ClassVar[str] = "Exp"
    ensures: ClassVar[frozenset[Property]] = frozenset({NO_NEG})


@dataclass(frozen=True, kw_only=True)
class NeedsNoNeg(ReplaceOpType):
    """Wants to run after something removes Neg."""

    name: ClassVar[str] = "needs-no-neg"
    requires: ClassVar[frozenset[Property]] = frozenset({NO_NEG})
    source_op: ClassVar[str] = "Exp"
    target_op: ClassVar[str] = "Log"


@dataclass(frozen=True, kw_only=True)
class UndeclaredInvalidation(ReplaceOpType):
    """Breaks a fact without saying so."""

    name: ClassVar[str] = "secretive"


@dataclass(frozen=True, kw_only=True)
class FalseEnsures(ReplaceOpType):
    """Ensures what it does not do."""

    name: ClassVar[str] = "boastful"
    ensures: ClassVar[frozenset[Property]] = frozenset({NO_NEG})
    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})


@dataclass(frozen=True, kw_only=True)
class UnexplainedNoOp(ReplaceOpType):
    """Does nothing and says nothing."""

    name: ClassVar[str] = "silent"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        return Change()


@dataclass(frozen=True, kw_only=True)
class RefusingPass(ReplaceOpType):
    """Refuses."""

    name: ClassVar[str] = "unwilling"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        return Refusal(reason="an Abs stands in the way", location="a", hint="run abs-to-relu first")


@dataclass(frozen=True, kw_only=True)
class RaisingPass(ReplaceOpType):
    """Fails."""

    name: ClassVar[str] = "clumsy"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        raise KeyError("weights")
