"""kv-compact: prompts are compacted to a budget of what their last queries attend to; what is generated is appended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_DENSE, KV_EXACT, KV_FIXED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import CacheMap
    from ryzen_passes.kv.compact.rewrite import Compaction
    from ryzen_passes.kv.static.cache_view import FixedForm

_MOST = 32768
"""What KVSelect names slots of."""
_MOST_ON_RTX = 3840
"""What TensorRT's TopK takes, which KVSelect is there."""


@dataclass(frozen=True, kw_only=True)
class KvCompact(Pass):
    """Keep `budget` tokens of a prompt a head and layer: those that its last `window` queries attend to, and the window.

    A prompt fed in one step is compacted as SnapKV does, arXiv 2404.14469; one fed in steps, step by step, in constant memory.
    Each step needs `window` tokens of a row for that: fewer are appended, as generated tokens are. These have `room` more
    slots a head; when they are full what is least attended to goes, then what was appended first. As long as a sequence is no
    longer than the budget nothing is lost. Keys keep the positions that they were made at.

    A step of several tokens computes window * heads * (slots + step) weights of attention a row beside its own attention.
    """

    name: ClassVar[str] = "kv-compact"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_DENSE, KV_EXACT})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_DENSE})

    window: int = 32
    """How many of the last tokens of a prompt are kept, and choose what else is: from 2."""
    budget: str = "50%"
    """Tokens that a head keeps of prompts, on average over the layers: a number, a share of the capacity that kv-static gave,
    `25%`, or the bytes of all states of so many sequences, room among them, `2GB/8`."""
    pooling: int = 5
    """Over how many neighbours attention is averaged: odd; 1: each token for itself."""
    pyramid: float = 1.0
    """How many times as many tokens a layer keeps on average as the last one does: from 1, which gives each the same."""
    room: int = 256
    """Slots a head beyond the budget, for what is appended: from 1."""
    sinks: int = 4
    """How many of the first tokens stay: from 0; SnapKV has none."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        from ryzen_passes.kv.static.cache_view import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        method = self._method(form, context)
        if isinstance(method, Refusal):
            return Estimate(why=f"it would be refused: {method.says}")
        mean = sum(method.slots) / len(method.slots)
        why = f"{mean:g} of {form.layers[0].told.slots} slots a head, {self.room} of them for what is generated"
        if form.seq != 1:
            most = max(
                layer.told.heads * slots * self.window * 4 for layer, slots in zip(form.layers, method.slots, strict=True)
            )
            why += f"; weights of attention of {most} bytes a row and more by the step's tokens, one layer at a time"
        return Estimate(state_bytes=-method.saves(form), why=why)

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.compact.rewrite import compact
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed
        from ryzen_passes.kv.transaction import attempt

        form = read_fixed(model)
        if isinstance(form, str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        method = self._method(form, context)
        if isinstance(method, Refusal):
            return method

        def do(copy: ir.Model) -> Change:
            found = read_fixed(copy)
            assert isinstance(found, FixedForm)
            return compact(found, Known(copy), method, as_op=context.backend == "tensorrt")

        return attempt(model, do)

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes caches that keep the same; None where no layer is compacted."""
        from ryzen_passes.kv.scorers.snapkv import SnapKv

        if all(layer.method != SnapKv.name for layer in told.layers):
            return None
        from ryzen_passes.kv.compact.torch_reference import compacting

        return compacting(told, singles=singles, module=module)

    def _method(self, form: FixedForm, context: Context) -> Compaction | Refusal:
        """Return what is to be kept of `form`, or why that cannot be."""
        from ryzen_passes.kv.compact.rewrite import Compaction
        from ryzen_passes.kv.evict.budgets import pyramid, slots_of
        from ryzen_passes.kv.evict.rewrite import token_bytes
        from ryzen_passes.kv.static.cache_view import biased

        if refusal := biased(form) or self._out_of_range():
            return refusal
        if isinstance(form.seq, int) and 1 < form.seq < self.window:
            says = f"a step of {form.seq} tokens holds no window of {self.window}: no prompt would be compacted"
            return Refusal(says=says, where="window", hint=f"lower it to {form.seq}, or make steps of any number of tokens")
        capacity, least = min(layer.told.slots or 0 for layer in form.layers), self.sinks + self.window
        budget = slots_of(self.budget, capacity, token_bytes(form), room=self.room)
        if budget is None:
            hint = "write tokens, 1024, a share, 25%, or bytes for so many sequences, 2GB/8"
            return Refusal(says=f"`{self.budget}` is no budget", where="budget", hint=hint)
        if budget < least:
            return Refusal(
                says=f"a budget of {budget} tokens is less than {self.sinks} sinks and a window of {self.window}",
                where="budget",
                hint=f"give it at least {least}, or lower sinks or window",
            )
        if budget + self.room > capacity:
            says = f"a budget of {budget} tokens and room for {self.room} are more than the capacity of {capacity}"
            return Refusal(says=says, where="budget, room", hint="lower them")
        slots = tuple(kept + self.room for kept in pyramid(budget, len(form.layers), self.pyramid, least, capacity - self.room))
        most = _MOST_ON_RTX if context.backend == "tensorrt-rtx" else _MOST
        if form.seq != 1 and max(slots) > most:
            says = f"{max(slots)} slots a head are more than the {most} that can be chosen from on {context.backend}"
            return Refusal(says=says, where="budget, room", hint="lower them")
        return Compaction(slots=slots, sinks=self.sinks, recent=self.window, room=self.room, pooling=self.pooling)

    def _out_of_range(self) -> Refusal | None:
        if self.window < 2 or self.sinks < 0 or self.room < 1:
            says = f"a window of {self.window}, {self.sinks} sinks and room for {self.room} cannot be"
            return Refusal(says=says, where="window, sinks, room", hint="a window is from 2, sinks are from 0, room is from 1")
        if self.pooling < 1 or self.pooling % 2 == 0 or self.pyramid < 1:
            says = f"`pooling` {self.pooling} and `pyramid` {self.pyramid:g} cannot be"
            return Refusal(says=says, where="pooling, pyramid", hint="`pooling` is odd, `pyramid` from 1")
        return None
