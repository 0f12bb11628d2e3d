"""kv-window: caches of the first tokens and the latest tokens, at their positions inside the cache (StreamingLLM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_passes.kv.static_cache_pass import StaticCachePass

if TYPE_CHECKING:
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.recognition.rotation import Rotation
    from ryzen_passes.kv.static.cache_view import StaticCacheView


@dataclass(frozen=True, kw_only=True)
class KvWindow(StaticCachePass):
    """Keep the first `sinks` and the latest `window` tokens, at their positions inside the cache: StreamingLLM.

    arXiv 2309.17453. Exact while a sequence has at most `sinks` + `window` tokens. Beyond that the positions of the sinks move
    along with the window and directly precede it, so that no distance from query to key exceeds the cache length. The result
    does not depend on how tokens are divided into steps. The model must encode positions by a rotation of the keys (RoPE).
    A ring buffer that kv-static made for an attention window of at most `window` tokens is left as it is, which is equivalent.
    """

    name: ClassVar[str] = "kv-window"

    sinks: int = 4
    """Number of first tokens that are never evicted, at least 0."""
    window: int
    """Number of latest tokens that are kept, at least 1."""

    def estimate_view(self, view: StaticCacheView, config: dict[int, Rotation]) -> PassEstimate:
        """Return the change in bytes of the states of one sequence, including the unrotated keys of the sinks."""
        slots, state_bytes = self.sinks + self.window, 0
        for layer in (view.layers[index] for index in config):
            saved_slots = layer.slots - slots
            state_bytes += layer.spec.kv_heads * (layer.key.row_bytes * self.sinks - layer.row_bytes * saved_slots)
        return PassEstimate(state_bytes=state_bytes, reason=f"{slots} of {view.capacity} slots per head")

    def rewrite_view(
        self, view: StaticCacheView, model_info: ModelInfo, config: dict[int, Rotation], context: PassContext
    ) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.window.rewrite import keep_window

        if not config:
            return Change(summary=f"every layer has an attention window of at most {self.window} tokens and keeps that window")
        return keep_window(view, model_info, config, sinks=self.sinks, window=self.window)

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches of the same method; None if no layer uses it or caches are quantized."""
        from ryzen_compile.spec.kv_cache import RingBuffer

        if not spec.is_unquantized or not any(layer.method == RingBuffer.method for layer in spec.layers):
            return None
        from ryzen_passes.kv.window.torch_reference import streaming_cache_factory

        return streaming_cache_factory(spec, module=module)

    def configure(self, view: StaticCacheView, context: PassContext) -> dict[int, Rotation] | Refusal:
        """Return the key rotation by the index of each layer to rewrite, or the reason why the pass does not apply."""
        from ryzen_passes.kv.recognition.rotation import recognize_rotation
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        slots, capacity = self.sinks + self.window, view.capacity
        for option, value, minimum, hint in (
            ("sinks", self.sinks, 0, "set the number of first tokens to keep: kv-window{window=1024,sinks=4}"),
            ("window", self.window, 1, "set the number of latest tokens to keep: kv-window{window=1024}"),
        ):
            if value < minimum:
                return Refusal(reason=f"`{option}` must be at least {minimum} (got {value})", location=option, hint=hint)
        if slots > capacity:
            return Refusal(
                reason=f"`sinks` {self.sinks} + `window` {self.window} exceed the capacity of {capacity} tokens",
                location="window",
                hint=f"lower `window` to {max(capacity - self.sinks, 1)}",
            )
        rotations: dict[int, Rotation] = {}
        for index, layer in enumerate(view.layers):
            if layer.spec.has_exact_ring and layer.slots <= self.window:
                continue
            rotation = recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size)
            if isinstance(rotation, str):
                return Refusal(
                    reason=rotation,
                    location=layer.spec.attention_node,
                    hint=f"kv-evict{{score=position,budget={slots},sinks={self.sinks}}} keeps the same tokens at their original"
                    " positions",
                )
            rotations[index] = rotation
        return rotations
