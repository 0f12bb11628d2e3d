"""kv-window: caches of the first tokens and the latest ones, at the positions that they have inside the cache."""

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
    from ryzen_passes.kv.recognition.rotation import Rotation
    from ryzen_passes.kv.static.cache_view import StaticCacheView


@dataclass(frozen=True, kw_only=True)
class KvWindow(Pass):
    """Keep the `sinks` first tokens and the `window` latest, at the positions that they have inside the cache: StreamingLLM.

    arXiv 2309.17453. As long as a sequence is no longer than both nothing is lost. Behind that the sinks follow the window:
    they stand right before it, so that no query is further from a key than the cache is long. What a token attends to does not
    depend on how tokens are cut into steps. It takes a model whose positions enter by a rotation of the keys (RoPE).
    """

    name: ClassVar[str] = "kv-window"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_DENSE, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_DENSE})

    sinks: int = 4
    """How many of the first tokens stay: from 0."""
    window: int = 0
    """How many of the latest tokens stay: from 1."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states that are saved, the second keys of the sinks paid for."""
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return PassEstimate(reason=f"it would be refused: {form}")
        found = self._rotations(form)
        if not isinstance(found, list):
            return PassEstimate(reason=f"it would be refused: {found.reason}")
        gained = 0
        for layer in form.layers:
            told = layer.spec
            key, value = (side.spec.head_size * _element_bytes(side.past) for side in (layer.key, layer.value))
            gained += told.kv_heads * ((key + value) * (self.sinks + self.window - (told.slots or 0)) + key * self.sinks)
        return PassEstimate(
            state_bytes=gained, reason=f"{self.sinks + self.window} of {form.layers[0].spec.slots} slots a head"
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
        from ryzen_passes.kv.transaction import transaction
        from ryzen_passes.kv.window.rewrite import to_ring_buffer

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return Refusal(reason=form, location="the caches", hint="put kv-static{capacity=...} before it")
        found = self._rotations(form)
        if not isinstance(found, list):
            return found

        def do(copy: ir.Model) -> Change:
            fixed = read_static_cache_view(copy)
            assert isinstance(fixed, StaticCacheView)
            return to_ring_buffer(fixed, ModelInfo(copy), found, sinks=self.sinks, window=self.window)

        return transaction(model, do)

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes caches whose sinks follow the window; None where no layer keeps so, or slots hold codes."""
        from ryzen_passes.kv.window.rewrite import METHOD

        if not spec.is_unquantized or all(layer.method != METHOD for layer in spec.layers):
            return None
        from ryzen_passes.kv.window.torch_reference import streaming_cache_factory

        return streaming_cache_factory(spec, module=module)

    def _rotations(self, view: StaticCacheView) -> list[Rotation] | Refusal:
        """Return how the keys of each layer are turned, or why the pass cannot apply."""
        from ryzen_passes.kv.recognition.rotation import recognize_rotation
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        slots, capacity = self.sinks + self.window, min(layer.spec.slots or 0 for layer in view.layers)
        if self.sinks < 0 or self.window < 1:
            says = f"{self.sinks} sinks and a window of {self.window} tokens cannot be"
            return Refusal(
                reason=says, location="sinks, window", hint="say how many of the latest tokens stay: kv-window{window=1024}"
            )
        if slots > capacity:
            says = f"{self.sinks} sinks and a window of {self.window} tokens are more than the capacity of {capacity}"
            return Refusal(reason=says, location="window", hint=f"lower it to {max(capacity - self.sinks, 1)}")
        found: list[Rotation] = []
        for layer in view.layers:
            rotation = recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size)
            if isinstance(rotation, str):
                hint = (
                    f"kv-evict{{score=position,budget={slots},sinks={self.sinks}}} keeps the same tokens at their own positions"
                )
                return Refusal(reason=rotation, location=layer.spec.attention_node, hint=hint)
            found.append(rotation)
        return found


def _element_bytes(value: ir.Value) -> int:
    return int(value.dtype.numpy().itemsize) if value.dtype is not None else 4
