"""Toy facts and passes on a small graph, to try the orchestrator on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
toy (float[N] x) => (float[N] y) { [a] h = Abs (x)  [b] y = Neg (h) }
"""


def toy() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def _lacks(op_type: str) -> Fact:
    def check(model: ir.Model) -> str | None:
        guilty = [node.name for node in model.graph if node.op_type == op_type]
        return f"`{guilty[0]}` is a {op_type}" if guilty else None

    return Fact(f"no/{op_type.lower()}", f"there is no {op_type}", check)


NO_ABS = _lacks("Abs")
NO_NEG = _lacks("Neg")
NO_RELU = _lacks("Relu")
FACTS = frozenset({NO_ABS, NO_NEG, NO_RELU})


@dataclass(frozen=True, kw_only=True)
class Swap(Pass):
    """Rename every node of one type to another: honest about it only as far as a subclass says."""

    name: ClassVar[str] = "swap"
    before: ClassVar[str] = "Abs"
    after: ClassVar[str] = "Relu"

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        return Estimate()

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        touched = [node for node in model.graph if node.op_type == self.before]
        for node in touched:
            node.op_type = self.after
        return Change(changed=tuple(node.name or "" for node in touched), says=f"{len(touched)} swapped")


@dataclass(frozen=True, kw_only=True)
class AbsToRelu(Swap):
    """Honest."""

    name: ClassVar[str] = "abs-to-relu"
    ensures: ClassVar[frozenset[Fact]] = frozenset({NO_ABS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({NO_RELU})


@dataclass(frozen=True, kw_only=True)
class NeedsNoRelu(Swap):
    """Wants to run before anything makes a Relu."""

    name: ClassVar[str] = "needs-no-relu"
    requires: ClassVar[frozenset[Fact]] = frozenset({NO_RELU})
    before: ClassVar[str] = "Neg"
    after: ClassVar[str] = "Exp"
    ensures: ClassVar[frozenset[Fact]] = frozenset({NO_NEG})


@dataclass(frozen=True, kw_only=True)
class NeedsNoNeg(Swap):
    """Wants to run after something removes Neg."""

    name: ClassVar[str] = "needs-no-neg"
    requires: ClassVar[frozenset[Fact]] = frozenset({NO_NEG})
    before: ClassVar[str] = "Exp"
    after: ClassVar[str] = "Log"


@dataclass(frozen=True, kw_only=True)
class Secretive(Swap):
    """Breaks a fact without saying so."""

    name: ClassVar[str] = "secretive"


@dataclass(frozen=True, kw_only=True)
class Boastful(Swap):
    """Ensures what it does not do."""

    name: ClassVar[str] = "boastful"
    ensures: ClassVar[frozenset[Fact]] = frozenset({NO_NEG})
    breaks: ClassVar[frozenset[Fact]] = frozenset({NO_RELU})


@dataclass(frozen=True, kw_only=True)
class Silent(Swap):
    """Does nothing and says nothing."""

    name: ClassVar[str] = "silent"

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        return Change()


@dataclass(frozen=True, kw_only=True)
class Unwilling(Swap):
    """Refuses."""

    name: ClassVar[str] = "unwilling"

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        return Refusal(says="an Abs stands in the way", where="a", hint="run abs-to-relu first")


@dataclass(frozen=True, kw_only=True)
class Clumsy(Swap):
    """Fails."""

    name: ClassVar[str] = "clumsy"

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        raise KeyError("weights")
