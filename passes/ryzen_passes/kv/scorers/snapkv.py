"""SnapKV: what the latest queries of a prompt attend to is kept, and what was appended since."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scoring
from ryzen_passes.kv.static.cache_view import FixedLayer

ABOVE = 2
"""Scores of attention are means of probabilities: at most 1."""


class SnapKv(Scoring):
    """Attention where a prompt was compacted, see `_kv.compacting`; of an appended token its position + 2, exact to 2^24."""

    name: ClassVar[str] = "snapkv"
    says: ClassVar[str] = "what the latest queries of a prompt attend to is kept, and what was appended since"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores of appended tokens."""
        place = self.place
        score = place.op(before, "Cast", [place.new_position], FLOAT, to=int(FLOAT))
        above = place.op(before, "Add", [score, place.write.number(ABOVE, FLOAT)])
        apart = place.op(before, "Unsqueeze", [above, place.write.integers(1)])
        return place.op(before, "Expand", [apart, place.write.integers(1, layer.told.kv_heads, 1)])
