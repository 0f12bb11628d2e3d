"""Fake properties and passes on a two-node graph, for tests of the pipeline."""

from __future__ import annotations

import re
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
        matches = [node.name for node in model.graph if node.op_type == op_type]
        return f"`{matches[0]}` is a {op_type}" if matches else None

    return Property(f"no/{op_type.lower()}", f"there is no {op_type}", check)


NO_ABS = _contains_no("Abs")
NO_NEG = _contains_no("Neg")
NO_RELU = _contains_no("Relu")
PROPERTIES = frozenset({NO_ABS, NO_NEG, NO_RELU})


@dataclass(frozen=True, kw_only=True)
class ReplaceOpType(Pass):
    """Replace the op type of every node of one type; subclasses declare the properties, correctly or not."""

    name: ClassVar[str] = "replace"
    """By default the name of the class in kebab-case."""
    source_op: ClassVar[str] = "Abs"
    target_op: ClassVar[str] = "Relu"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        return PassEstimate()

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        replaced = [node for node in model.graph if node.op_type == self.source_op]
        for node in replaced:
            node.op_type = self.target_op
        return Change(changed=tuple(node.name or "" for node in replaced), summary=f"{len(replaced)} replaced")


class AbsToRelu(ReplaceOpType):
    """A pass with a correct declaration."""

    ensures: ClassVar[frozenset[Property]] = frozenset({NO_ABS})
    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})


class ReluToExp(ReplaceOpType):
    """Restores the property that AbsToRelu invalidates."""

    source_op: ClassVar[str] = "Relu"
    target_op: ClassVar[str] = "Exp"
    ensures: ClassVar[frozenset[Property]] = frozenset({NO_RELU})


class ReplaceForOneBackend(ReplaceOpType):
    """A pass whose result depends on the backend."""

    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        if context.backend != "onnxruntime":
            return Change(summary="nothing to do for this backend")
        return super().rewrite(model, context)


class NeedsNoRelu(ReplaceOpType):
    """Requires that the model has no Relu."""

    requires: ClassVar[frozenset[Property]] = frozenset({NO_RELU})
    source_op: ClassVar[str] = "Neg"
    target_op: ClassVar[str] = "Exp"
    ensures: ClassVar[frozenset[Property]] = frozenset({NO_NEG})


class NeedsNoNeg(ReplaceOpType):
    """Requires that the model has no Neg."""

    requires: ClassVar[frozenset[Property]] = frozenset({NO_NEG})
    source_op: ClassVar[str] = "Exp"
    target_op: ClassVar[str] = "Log"


class UndeclaredInvalidation(ReplaceOpType):
    """Invalidates a property without declaring it."""


class FalseEnsures(ReplaceOpType):
    """Declares a postcondition that it does not establish."""

    ensures: ClassVar[frozenset[Property]] = frozenset({NO_NEG})
    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})


class DuplicateName(ReplaceOpType):
    """Returns a graph with two values of one name."""

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        model.graph.node(0).outputs[0].name = "y"
        return Change(summary="renamed", changed=("a",))


class WrongShape(ReplaceOpType):
    """Declares a shape that contradicts the graph."""

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        model.graph.outputs[0].shape = ir.Shape(["N", 3])
        return Change(summary="declared", changed=("b",))


class UnexplainedNoOp(ReplaceOpType):
    """Changes nothing and gives no reason."""

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        return Change()


class UnreportedChange(ReplaceOpType):
    """Changes the model and reports no change."""

    invalidates: ClassVar[frozenset[Property]] = frozenset({NO_RELU})

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        super().rewrite(model, context)
        return Change(summary="nothing to replace")


class RefusalAfterChange(ReplaceOpType):
    """Changes the model and then refuses it."""

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        super().rewrite(model, context)
        return Refusal(reason="a Neg is not supported", location="b")


class RefusingPass(ReplaceOpType):
    """Always refuses."""

    name: ClassVar[str] = "refusing"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        return Refusal(reason="an Abs is not supported", location="a", hint="run abs-to-relu first")


class RaisingPass(ReplaceOpType):
    """Raises an exception."""

    name: ClassVar[str] = "raising"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        raise KeyError("weights")
