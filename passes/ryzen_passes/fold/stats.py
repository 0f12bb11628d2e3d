"""Statistics of a fold: counts for the summary, node names for the pass log."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.spec.passes import Change
from ryzen_passes.fold.constant_evaluation import EvaluationBudget


def node_label(node: ir.Node) -> str:
    """Return the name of a node, or its op type and first output if it has no name."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"


@dataclass
class FoldStats:
    """Counts and names of the changes so far."""

    constants: int = 0
    """Nodes replaced by a constant."""
    shape_computations: int = 0
    """Shape computations replaced by an equal one, or by a constant shape of a Reshape or Expand."""
    identities: int = 0
    """Nodes replaced by one of their inputs."""
    expressions: int = 0
    """Nodes replaced by an equivalent node."""
    duplicates: int = 0
    """Initializers replaced by an equal one."""
    inlined_branches: int = 0
    """Ifs replaced by one of their branches."""
    merged_views: int = 0
    """Views and transposes merged with the one before them."""
    inserted: dict[str, None] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    removed: dict[str, None] = field(default_factory=dict)
    not_evaluated: dict[str, str] = field(default_factory=dict)
    """Label to reason, for the nodes with constant operands that the last iteration left in the graph because of a limit."""
    budget: EvaluationBudget = field(default_factory=EvaluationBudget)

    def record_inserted(self, node: ir.Node) -> None:
        """Record a new node."""
        self.inserted[node_label(node)] = None

    def record_changed(self, node: ir.Node) -> None:
        """Record a node with a replaced operand or attribute."""
        self.changed[node_label(node)] = None

    def record_removed(self, name: str) -> None:
        """Record a removed node or declaration."""
        if name in self.inserted:
            del self.inserted[name]
        else:
            self.removed[name] = None
        self.changed.pop(name, None)

    def rewrite_count(self) -> int:
        """Return the number of rewrites, without the removal of dead nodes and declarations."""
        counts = (
            self.constants,
            self.shape_computations,
            self.identities,
            self.expressions,
            self.duplicates,
            self.inlined_branches,
            self.merged_views,
        )
        return sum(counts)

    def to_change(self) -> Change:
        """Return the change with its summary."""
        counts = (
            (self.constants, "constant", "constants"),
            (self.shape_computations, "shape computation", "shape computations"),
            (self.identities, "identity", "identities"),
            (self.merged_views, "view of a view", "views of views"),
            (self.expressions, "repeated expression", "repeated expressions"),
            (self.duplicates, "duplicate initializer", "duplicate initializers"),
            (self.inlined_branches, "constant If", "constant Ifs"),
        )
        folded = [_format_count(count, singular, plural) for count, singular, plural in counts if count]
        removed = [_format_count(len(self.removed), "node or declaration", "nodes and declarations")] if self.removed else []
        notes = tuple(f"{label}: not evaluated: {reason}" for label, reason in self.not_evaluated.items())
        if not folded and not removed:
            return Change(summary="no part of the graph is constant, repeated or unused", notes=notes)
        parts = [f"{verb} {', '.join(items)}" for verb, items in (("folded", folded), ("removed", removed)) if items]
        return Change(
            inserted=tuple(self.inserted),
            removed=tuple(self.removed),
            changed=tuple(self.changed),
            summary="; ".join(parts),
            notes=notes,
        )


def _format_count(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"
