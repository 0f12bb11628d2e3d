"""kv-compact: compact prompts to the tokens that their last queries attend to, and append generated tokens (SnapKV)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_passes.kv.static_cache_pass import StaticCachePass

if TYPE_CHECKING:
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.compact.rewrite import CompactionConfig
    from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView

_MAX_SLOTS = 32768
"""The maximum number of slots of the op KVSelect; without plugins, the maximum k of TopK may be lower."""


@dataclass(frozen=True, kw_only=True)
class KvCompact(StaticCachePass):
    """Keep `budget` prompt tokens per head and layer: the last `window` tokens, and those to which their queries attend most.

    A prompt in a single step is compacted as by SnapKV, arXiv 2404.14469; a prompt in several steps is compacted step by step,
    in constant memory. A step compacts a row only if the row has at least `window` tokens; fewer tokens are appended, like
    generated tokens. Appended tokens take `append-slots` further slots per head; once these are full, the token of lowest
    attention is evicted first, then the oldest appended token. Exact while a sequence is no longer than the budget. Keys keep
    their original positions.

    A step of several tokens computes window * heads * (slots + step) attention weights per row in addition to its attention.
    """

    name: ClassVar[str] = "kv-compact"

    window: int = 32
    """Number of last prompt tokens that are kept and whose queries score the other tokens, at least 2."""
    budget: str = "50%"
    """Prompt tokens that a head keeps, averaged over the layers: a number, a percentage of the capacity set by kv-static
    (`25%`), or the bytes of all states of a number of sequences, `append-slots` included (`2GB/8`)."""
    pooling: int = 5
    """Number of neighboring tokens over which attention is averaged, odd; 1: no averaging."""
    pyramid: float = 1.0
    """Ratio of the average number of tokens per layer to that of the last layer, at least 1; 1: all layers keep the same."""
    append_slots: int = 256
    """Slots per head in addition to the budget, for appended tokens, at least 1."""
    sinks: int = 4
    """Number of first tokens that are never evicted, at least 0; 0 in SnapKV."""

    def estimate_view(self, view: StaticCacheView, config: CompactionConfig) -> PassEstimate:
        """Return the change in bytes of the states of one sequence, including the score and position states."""
        slots = [layer.slots if count is None else count for layer, count in zip(view.layers, config.slots, strict=True)]
        mean = sum(slots) / len(slots)
        reason = f"{mean:g} of {view.capacity} slots per head, {self.append_slots} of them for appended tokens"
        if view.seq != 1:
            weight_bytes = max(
                layer.spec.heads * count * self.window * 4 for layer, count in zip(view.layers, slots, strict=True)
            )
            reason += f"; {weight_bytes} bytes of attention weights per row and layer, plus those of the step's tokens"
        return PassEstimate(state_bytes=-config.saved_bytes(view), reason=reason)

    def rewrite_view(
        self, view: StaticCacheView, model_info: ModelInfo, config: CompactionConfig, context: PassContext
    ) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.compact.rewrite import compact

        return compact(view, model_info, config, use_custom_op=find_traits(context.backend).supports_plugins)

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches of the same method; None if no layer uses it or caches are quantized."""
        from ryzen_compile.spec.kv_cache import Compaction

        if not spec.is_unquantized or not any(isinstance(layer.policy, Compaction) for layer in spec.layers):
            return None
        from ryzen_passes.kv.compact.torch_reference import compacting_cache_factory

        return compacting_cache_factory(spec, single_token=single_token, module=module)

    def configure(self, view: StaticCacheView, context: PassContext) -> CompactionConfig | Refusal:
        """Return the compaction configuration for `view`, or the reason why the options do not apply to it."""
        from ryzen_passes.kv.budgets import BUDGET_HINT, parse_budget, pyramid_budgets
        from ryzen_passes.kv.compact.rewrite import CompactionConfig
        from ryzen_passes.kv.evict.rewrite import exact_ring_slots, state_bytes
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if refusal := refuse_alibi(view) or self._check_options():
            return refusal
        if isinstance(view.seq, int) and 1 < view.seq < self.window:
            return Refusal(
                reason=f"`window` {self.window} exceeds the step size of {view.seq} tokens: no prompt would be compacted",
                location="window",
                hint=f"lower `window` to {view.seq}, or allow steps of any size (kv-static{{step=0}})",
            )
        capacity, minimum = view.capacity, self.sinks + self.window
        budget = parse_budget(
            self.budget,
            capacity,
            functools.partial(state_bytes, view, layer_slots=_compacting_slots),
            append_slots=self.append_slots,
            ring_slots=exact_ring_slots(view),
        )
        if budget is None:
            return Refusal(
                reason=f"`budget` must be a token count, a percentage or a memory size (got `{self.budget}`)",
                location="budget",
                hint=BUDGET_HINT,
            )
        if budget < minimum:
            return Refusal(
                reason=f"`budget` of {budget} tokens is less than `sinks` {self.sinks} + `window` {self.window}",
                location="budget",
                hint=f"set `budget` to at least {minimum} tokens, or lower `sinks` or `window`",
            )
        if budget + self.append_slots > capacity:
            return Refusal(
                reason=f"`budget` of {budget} tokens + `append-slots` {self.append_slots} exceed the capacity of {capacity}",
                location="budget, append-slots",
                hint="lower `budget` or `append-slots`, or raise `capacity` of kv-static",
            )
        budgets = pyramid_budgets(budget, len(view.layers), self.pyramid, minimum, capacity - self.append_slots)
        slots = tuple(
            _compacting_slots(layer, layer_budget + self.append_slots)
            for layer, layer_budget in zip(view.layers, budgets, strict=True)
        )
        largest = max((count for count in slots if count is not None), default=0)
        traits = find_traits(context.backend)
        max_slots = _MAX_SLOTS if traits.supports_plugins else min(_MAX_SLOTS, traits.max_topk or _MAX_SLOTS)
        if view.seq != 1 and largest > max_slots:
            return Refusal(
                reason=f"{largest} slots per head exceed the maximum of {max_slots} slots on {context.backend}",
                location="budget, append-slots",
                hint="lower `budget` or `append-slots`",
            )
        return CompactionConfig(
            slots=slots, sinks=self.sinks, recent_window=self.window, append_slots=self.append_slots, pooling=self.pooling
        )

    def _check_options(self) -> Refusal | None:
        for option, value, minimum, hint in (
            ("window", self.window, 2, "set the number of last prompt tokens whose queries score the others: window=32"),
            ("sinks", self.sinks, 0, "set the number of first tokens that are never evicted: sinks=4"),
            ("append-slots", self.append_slots, 1, "set the number of slots for appended tokens: append-slots=256"),
            ("pyramid", self.pyramid, 1, "set it to 1 to give every layer the same budget"),
        ):
            if value < minimum:
                return Refusal(reason=f"`{option}` must be at least {minimum} (got {value:g})", location=option, hint=hint)
        if self.pooling < 1 or self.pooling % 2 == 0:
            return Refusal(
                reason=f"`pooling` must be an odd number of at least 1 (got {self.pooling})",
                location="pooling",
                hint="set it to 1 to disable averaging",
            )
        return None


def _compacting_slots(layer: StaticCacheLayer, slots: int) -> int | None:
    """Return `slots`, or None if `layer` has a ring buffer that fits into them, which is exact and stays unchanged."""
    return None if layer.spec.has_exact_ring and layer.slots <= slots else slots
