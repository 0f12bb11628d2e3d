"""kv-window: caches of the first tokens and the latest ones, at the positions that they have inside the cache."""

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
    from ryzen_passes.kv.recognition.rotation import Rotation
    from ryzen_passes.kv.static.cache_view import FixedForm


@dataclass(frozen=True, kw_only=True)
class KvWindow(Pass):
    """Keep the `sinks` first tokens and the `window` latest, at the positions that they have inside the cache: StreamingLLM.

    arXiv 2309.17453. As long as a sequence is no longer than both nothing is lost. Behind that the sinks follow the window:
    they stand right before it, so that no query is further from a key than the cache is long. What a token attends to does not
    depend on how tokens are cut into steps. It takes a model whose positions enter by a rotation of the keys (RoPE).
    """

    name: ClassVar[str] = "kv-window"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_DENSE, KV_EXACT})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_DENSE})

    sinks: int = 4
    """How many of the first tokens stay: from 0."""
    window: int = 0
    """How many of the latest tokens stay: from 1."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are saved, the second keys of the sinks paid for."""
        from ryzen_passes.kv.static.cache_view import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        found = self._rotations(form)
        if not isinstance(found, list):
            return Estimate(why=f"it would be refused: {found.says}")
        gained = 0
        for layer in form.layers:
            told = layer.told
            key, value = (side.told.size * _bytes(side.past) for side in (layer.key, layer.value))
            gained += told.kv_heads * ((key + value) * (self.sinks + self.window - (told.slots or 0)) + key * self.sinks)
        return Estimate(state_bytes=gained, why=f"{self.sinks + self.window} of {form.layers[0].told.slots} slots a head")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed
        from ryzen_passes.kv.transaction import attempt
        from ryzen_passes.kv.window.rewrite import to_ring

        form = read_fixed(model)
        if isinstance(form, str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        found = self._rotations(form)
        if not isinstance(found, list):
            return found

        def do(copy: ir.Model) -> Change:
            fixed = read_fixed(copy)
            assert isinstance(fixed, FixedForm)
            return to_ring(fixed, Known(copy), found, sinks=self.sinks, window=self.window)

        return attempt(model, do)

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes caches whose sinks follow the window; None where no layer keeps so, or slots hold codes."""
        from ryzen_passes.kv.window.rewrite import METHOD

        if not told.is_exact or all(layer.method != METHOD for layer in told.layers):
            return None
        from ryzen_passes.kv.window.torch_reference import streaming

        return streaming(told, module=module)

    def _rotations(self, form: FixedForm) -> list[Rotation] | Refusal:
        """Return how the keys of each layer are turned, or why the pass cannot apply."""
        from ryzen_passes.kv.recognition.rotation import rotation_of
        from ryzen_passes.kv.static.cache_view import biased

        if (refusal := biased(form)) is not None:
            return refusal
        slots, capacity = self.sinks + self.window, min(layer.told.slots or 0 for layer in form.layers)
        if self.sinks < 0 or self.window < 1:
            says = f"{self.sinks} sinks and a window of {self.window} tokens cannot be"
            return Refusal(
                says=says, where="sinks, window", hint="say how many of the latest tokens stay: kv-window{window=1024}"
            )
        if slots > capacity:
            says = f"{self.sinks} sinks and a window of {self.window} tokens are more than the capacity of {capacity}"
            return Refusal(says=says, where="window", hint=f"lower it to {max(capacity - self.sinks, 1)}")
        found: list[Rotation] = []
        for layer in form.layers:
            rotation = rotation_of(form, layer.key.new, layer.told.kv_heads, layer.key.told.size)
            if isinstance(rotation, str):
                hint = (
                    f"kv-evict{{score=position,budget={slots},sinks={self.sinks}}} keeps the same tokens at their own positions"
                )
                return Refusal(says=rotation, where=layer.told.attention, hint=hint)
            found.append(rotation)
        return found


def _bytes(value: ir.Value) -> int:
    return int(value.dtype.numpy().itemsize) if value.dtype is not None else 4
