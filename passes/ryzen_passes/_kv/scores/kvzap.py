"""KVzap: how much attention a token will get, foretold from the hidden state that its key and value are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from ryzen_passes._kv.fixed_form import FixedLayer
from ryzen_passes._kv.hidden import hidden_of
from ryzen_passes._kv.scores.scoring import FLOAT, Scoring


class KvZap(Scoring):
    """w.h + b, fitted to the logarithm of the most that a later query makes of a token: see `_kv.calibrating`."""

    name: ClassVar[str] = "kvzap"
    says: ClassVar[str] = "tokens that later queries are foretold to attend to are kept"
    paper: ClassVar[str] = "Jegou et al. 2026, arXiv 2601.07891, its linear form"
    is_calibrated: ClassVar[bool] = True

    @classmethod
    def problem(cls, layers: Sequence[FixedLayer]) -> str | None:
        """Return that a layer's hidden state was not found, where it was not."""
        for layer in layers:
            if hidden_of(layer.value.new) is None:
                return (
                    f"the values of `{layer.told.attention}` are no product of a hidden state (batch, seq, width) and weights"
                )
        return None

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores."""
        place, statistics = self.place, self.place.statistics
        hidden = hidden_of(layer.value.new)
        assert statistics is not None
        assert hidden is not None
        number = place.numbers[place.layers.index(layer)]
        weight, bias = (place.write.constant(statistics.tensor(number, word), FLOAT) for word in ("weight", "bias"))
        product = place.op(before, "MatMul", [place.wide(before, hidden), weight], FLOAT)
        return place.op(before, "Transpose", [place.op(before, "Add", [product, bias])], perm=[0, 2, 1])
