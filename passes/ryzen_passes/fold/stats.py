"""What a fold did: counts for the sentence, names for the record."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.spec.passes import Change


def label(node: ir.Node) -> str:
    """Return the name of a node, or, where it has none, its op and first output."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"


@dataclass
class Tally:
    """What was done so far."""

    constants: int = 0
    """Nodes whose result is held as a constant."""
    shapes: int = 0
    """Shape computations that are shared, or written into a Reshape or Expand."""
    identities: int = 0
    expressions: int = 0
    """Nodes that computed what another one computes."""
    duplicates: int = 0
    """Initializers that were equal to another one."""
    branches: int = 0
    """Ifs of which one branch was left."""
    merged: int = 0
    """Views and transposes that took over the one before them."""
    inserted: dict[str, None] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    removed: dict[str, None] = field(default_factory=dict)

    def insert(self, node: ir.Node) -> None:
        """Note a new node."""
        self.inserted[label(node)] = None

    def change(self, node: ir.Node) -> None:
        """Note a node that was given another operand."""
        self.changed[label(node)] = None

    def remove(self, name: str) -> None:
        """Note what is gone."""
        if name in self.inserted:
            del self.inserted[name]
        else:
            self.removed[name] = None
        self.changed.pop(name, None)

    def rewrites(self) -> int:
        """Return how much was rewritten; what was dropped since then is not counted."""
        counts = (self.constants, self.shapes, self.identities, self.expressions, self.duplicates, self.branches, self.merged)
        return sum(counts)

    def as_change(self) -> Change:
        """Return what was done, or why nothing was."""
        done = (
            (self.constants, "constant", "constants"),
            (self.shapes, "shape computation", "shape computations"),
            (self.identities, "identity", "identities"),
            (self.merged, "view of a view", "views of views"),
            (self.expressions, "repeated expression", "repeated expressions"),
            (self.duplicates, "duplicate initializer", "duplicate initializers"),
            (self.branches, "decided If", "decided Ifs"),
        )
        folded = [_counted(count, one, many) for count, one, many in done if count]
        dropped = [_counted(len(self.removed), "node or declaration", "nodes and declarations")] if self.removed else []
        if not folded and not dropped:
            return Change(says="no part of the graph is constant, repeated or unused")
        parts = [f"{verb} {', '.join(what)}" for verb, what in (("folded", folded), ("dropped", dropped)) if what]
        return Change(
            inserted=tuple(self.inserted), removed=tuple(self.removed), changed=tuple(self.changed), says="; ".join(parts)
        )


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
