"""kv-evict: caches of a fixed budget, in which a new token takes the slot of the one least worth keeping."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.contract import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.fact import Fact
from ryzen_passes.facts import KV_DENSE, KV_FIXED

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_passes._kv.fixed_form import FixedForm


@dataclass(frozen=True, kw_only=True)
class KvEvict(Pass):
    """Keep `budget` tokens a head and layer, by their scores; the first `sinks` and the latest `recent` are never evicted.

    As long as a sequence is no longer than the budget nothing is lost. Keys keep the positions that they were made at.
    """

    name: ClassVar[str] = "kv-evict"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_DENSE})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_DENSE})

    score: Literal["knorm", "value-norm", "position"] = "knorm"
    """What a token is worth keeping."""
    budget: str = "50%"
    """Tokens a head keeps: a number, or a share of the capacity that kv-static gave, `25%`."""
    sinks: int = 4
    """How many of the first tokens stay: from 0."""
    recent: int = 64
    """How many of the latest tokens stay: from 1."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        from ryzen_passes._kv.fixed_form import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        refusal = self._refusal(form)
        if refusal is not None:
            return Estimate(why=f"it would be refused: {refusal.says}")
        slots, saved = self._slots(form), 0
        for layer in form.layers:
            told = layer.told
            row = sum(side.told.size * _bytes(side.past) for side in (layer.key, layer.value))
            saved += told.kv_heads * (row * (told.slots or 0) - (row + 8) * slots)
        return Estimate(state_bytes=-saved, why=f"{slots} of {form.layers[0].told.slots} slots a head")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_passes._attention.write import Known
        from ryzen_passes._kv.attempt import attempt
        from ryzen_passes._kv.evicting import evict
        from ryzen_passes._kv.fixed_form import FixedForm, read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        refusal = self._refusal(form)
        if refusal is not None:
            return refusal

        def do(copy: ir.Model) -> Change:
            found = read_fixed(copy)
            assert isinstance(found, FixedForm)
            as_op = context.backend == "tensorrt"
            slots = self._slots(found)
            return evict(found, Known(copy), score=self.score, slots=slots, sinks=self.sinks, recent=self.recent, as_op=as_op)

        return attempt(model, do)

    def _slots(self, form: FixedForm) -> int:
        capacity = min(layer.told.slots or 0 for layer in form.layers)
        return int(capacity * float(self.budget[:-1]) / 100) if self.budget.endswith("%") else int(self.budget)

    def _refusal(self, form: FixedForm) -> Refusal | None:
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", self.budget):
            return Refusal(says=f"`{self.budget}` is no budget", where="budget", hint="write tokens, 1024, or a share, 25%")
        slots, capacity = self._slots(form), min(layer.told.slots or 0 for layer in form.layers)
        if self.sinks < 0 or self.recent < 1:
            says = f"{self.sinks} sinks and {self.recent} recent tokens cannot be"
            return Refusal(says=says, where="sinks, recent", hint="sinks are from 0, recent tokens from 1: the latest stays")
        least = self.sinks + self.recent
        if slots < least:
            return Refusal(
                says=f"a budget of {slots} tokens is less than {self.sinks} sinks and {self.recent} recent ones",
                where="budget",
                hint=f"give it at least {least}, or lower sinks or recent",
            )
        if slots > capacity:
            return Refusal(
                says=f"a budget of {slots} tokens is more than the capacity of {capacity}", where="budget", hint="lower it"
            )
        return None


def _bytes(value: ir.Value) -> int:
    return int(value.dtype.numpy().itemsize) if value.dtype is not None else 4
