"""What a fold did: counts for the sentence, names for the record."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.spec.passes import Change


def node_label(node: ir.Node) -> str:
    """Return the name of a node, or, where it has none, its op and first output."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"


@dataclass
class FoldStats:
    """What was done so far."""

    constants: int = 0
    """Nodes whose result is held as a constant."""
    shape_computations: int = 0
    """Shape computations that are shared, or written into a Reshape or Expand."""
    identities: int = 0
    expressions: int = 0
    """Nodes that computed what another one computes."""
    duplicates: int = 0
    """Initializers that were equal to another one."""
    inlined_branches: int = 0
    """Ifs of which one branch was left."""
    merged_views: int = 0
    """Views and transposes that took over the one before them."""
    inserted: dict[str, None] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    removed: dict[str, None] = field(default_factory=dict)

    def record_inserted(self, node: ir.Node) -> None:
        """Note a new node."""
        self.inserted[node_label(node)] = None

    def record_changed(self, node: ir.Node) -> None:
        """Note a node that was given another operand."""
        self.changed[node_label(node)] = None

    def record_removed(self, name: str) -> None:
        """Note what is gone."""
        if name in self.inserted:
            del self.inserted[name]
        else:
            self.removed[name] = None
        self.changed.pop(name, None)

    def rewrite_count(self) -> int:
        """Return how much was rewritten; what was dropped since then is not counted."""
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
        """Return what was done, or why nothing was."""
        done = (
            (self.constants, "constant", "constants"),
            (self.shape_computations, "shape computation", "shape computations"),
            (self.identities, "identity", "identities"),
            (self.merged_views, "view of a view", "views of views"),
            (self.expressions, "repeated expression", "repeated expressions"),
            (self.duplicates, "duplicate initializer", "duplicate initializers"),
            (self.inlined_branches, "decided If", "decided Ifs"),
        )
        folded = [_format_count(count, one, many) for count, one, many in done if count]
        dropped = [_format_count(len(self.removed), "node or declaration", "nodes and declarations")] if self.removed else []
        if not folded and not dropped:
            return Change(summary="no part of the graph is constant, repeated or unused")
        parts = [f"{verb} {', '.join(what)}" for verb, what in (("folded", folded), ("dropped", dropped)) if what]
        return Change(
            inserted=tuple(self.inserted), removed=tuple(self.removed), changed=tuple(self.changed), summary="; ".join(parts)
        )


def _format_count(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"
