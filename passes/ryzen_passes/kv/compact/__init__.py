"""kv-compact: prompts are compacted to a budget of what their last queries attend to; what is generated is appended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.compact.rewrite import CompactionConfig
    from ryzen_passes.kv.static.cache_view import StaticCacheView

_MAX_SLOTS = 32768
"""What KVSelect names slots of."""
_MAX_SLOTS_RTX = 3840
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
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_DENSE, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_DENSE})

    window: int = 32
    """How many of the last tokens of a prompt are kept, and choose what else is: from 2."""
    budget: str = "50%"
    """Tokens that a head keeps of prompts, on average over the layers: a number, a share of the capacity that kv-static gave,
    `25%`, or the bytes of all states of so many sequences, room among them, `2GB/8`."""
    pooling: int = 5
    """Over how many neighbours attention is averaged: odd; 1: each token for itself."""
    pyramid: float = 1.0
    """How many times as many tokens a layer keeps on average as the last one does: from 1, which gives each the same."""
    append_slots: int = 256
    """Slots a head beyond the budget, for what is appended: from 1."""
    sinks: int = 4
    """How many of the first tokens stay: from 0; SnapKV has none."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return PassEstimate(reason=f"it would be refused: {form}")
        method = self._config(form, context)
        if isinstance(method, Refusal):
            return PassEstimate(reason=f"it would be refused: {method.reason}")
        mean = sum(method.slots) / len(method.slots)
        why = f"{mean:g} of {form.layers[0].spec.slots} slots a head, {self.append_slots} of them for what is generated"
        if form.seq != 1:
            most = max(
                layer.spec.heads * slots * self.window * 4 for layer, slots in zip(form.layers, method.slots, strict=True)
            )
            why += f"; weights of attention of {most} bytes a row and more by the step's tokens, one layer at a time"
        return PassEstimate(state_bytes=-method.saved_bytes(form), reason=why)

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.compact.rewrite import compact
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
        from ryzen_passes.kv.transaction import transaction

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return Refusal(reason=form, location="the caches", hint="put kv-static{capacity=...} before it")
        method = self._config(form, context)
        if isinstance(method, Refusal):
            return method

        def do(copy: ir.Model) -> Change:
            found = read_static_cache_view(copy)
            assert isinstance(found, StaticCacheView)
            return compact(found, ModelInfo(copy), method, use_custom_op=context.backend == "tensorrt")

        return transaction(model, do)

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes caches that keep the same; None where no layer is compacted."""
        from ryzen_passes.kv.scorers.snapkv import SnapKvScorer

        if all(layer.method != SnapKvScorer.name for layer in spec.layers):
            return None
        from ryzen_passes.kv.compact.torch_reference import compacting_cache_factory

        return compacting_cache_factory(spec, single_token=single_token, module=module)

    def _config(self, view: StaticCacheView, context: PassContext) -> CompactionConfig | Refusal:
        """Return what is to be kept of `form`, or why that cannot be."""
        from ryzen_passes.kv.compact.rewrite import CompactionConfig
        from ryzen_passes.kv.evict.budgets import parse_budget, pyramid_budgets
        from ryzen_passes.kv.evict.rewrite import token_bytes
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if refusal := refuse_alibi(view) or self._check_options():
            return refusal
        if isinstance(view.seq, int) and 1 < view.seq < self.window:
            says = f"a step of {view.seq} tokens holds no window of {self.window}: no prompt would be compacted"
            return Refusal(
                reason=says, location="window", hint=f"lower it to {view.seq}, or make steps of any number of tokens"
            )
        capacity, least = min(layer.spec.slots or 0 for layer in view.layers), self.sinks + self.window
        budget = parse_budget(self.budget, capacity, token_bytes(view), append_slots=self.append_slots)
        if budget is None:
            hint = "write tokens, 1024, a share, 25%, or bytes for so many sequences, 2GB/8"
            return Refusal(reason=f"`{self.budget}` is no budget", location="budget", hint=hint)
        if budget < least:
            return Refusal(
                reason=f"a budget of {budget} tokens is less than {self.sinks} sinks and a window of {self.window}",
                location="budget",
                hint=f"give it at least {least}, or lower sinks or window",
            )
        if budget + self.append_slots > capacity:
            says = f"a budget of {budget} tokens and room for {self.append_slots} are more than the capacity of {capacity}"
            return Refusal(reason=says, location="budget, room", hint="lower them")
        slots = tuple(
            kept + self.append_slots
            for kept in pyramid_budgets(budget, len(view.layers), self.pyramid, least, capacity - self.append_slots)
        )
        most = _MAX_SLOTS_RTX if context.backend == "tensorrt-rtx" else _MAX_SLOTS
        if view.seq != 1 and max(slots) > most:
            says = f"{max(slots)} slots a head are more than the {most} that can be chosen from on {context.backend}"
            return Refusal(reason=says, location="budget, room", hint="lower them")
        return CompactionConfig(
            slots=slots, sinks=self.sinks, recent_window=self.window, append_slots=self.append_slots, pooling=self.pooling
        )

    def _check_options(self) -> Refusal | None:
        if self.window < 2 or self.sinks < 0 or self.append_slots < 1:
            says = f"a window of {self.window}, {self.sinks} sinks and room for {self.append_slots} cannot be"
            return Refusal(
                reason=says, location="window, sinks, room", hint="a window is from 2, sinks are from 0, room is from 1"
            )
        if self.pooling < 1 or self.pooling % 2 == 0 or self.pyramid < 1:
            says = f"`pooling` {self.pooling} and `pyramid` {self.pyramid:g} cannot be"
            return Refusal(reason=says, location="pooling, pyramid", hint="`pooling` is odd, `pyramid` from 1")
        return None
