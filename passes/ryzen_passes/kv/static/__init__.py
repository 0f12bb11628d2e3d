"""kv-static: growing caches become states of fixed capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_FIXED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import CacheMap


@dataclass(frozen=True, kw_only=True)
class KvStatic(Pass):
    """Give a decoder caches of fixed size, written in place: every step has one shape, and the host has no part in it.

    Exact. The keys and values of a token lie in the slot of its position. What told the graph the time (a mask over all
    tokens, position ids, the length of the caches) is told by one state instead, how many tokens each sequence has seen; the
    mask that is left is over the tokens of the step, and what it hides comes behind them. A step, padding included, must fit
    behind the tokens of every sequence. It is the base of the other kv passes.

    Attention is found by its structure, in whatever ops an exporter writes it; what its mask hides and where its positions
    come from is found by running that part of the graph on small numbers (this takes ONNX Runtime).
    """

    name: ClassVar[str] = "kv-static"
    changes_interface: ClassVar[bool] = True
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})

    capacity: int = 0
    """How many tokens a sequence may have in all: at least 1, at most the positions that the model has a table of."""
    step: int = 0
    """How many tokens a step takes: 1 for a graph that only decodes; 0: any number."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states; the growing caches that they replace were counted at no length."""
        from ryzen_passes.kv.recognition.decoder import Unrecognised
        from ryzen_passes.kv.recognition.recognize import recognise

        try:
            layers = recognise(model.clone()).layers
        except Unrecognised as why:
            return Estimate(why=f"it would be refused: {why.says}")
        row = sum(layer.kv_heads * (layer.key.row_bytes + layer.value.row_bytes) for layer in layers)
        return Estimate(state_bytes=row * self.capacity, why=f"{row} bytes a token and sequence, {self.capacity} tokens")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_passes.kv.transaction import attempt

        if self.capacity < 1 or self.step < 0 or self.step > self.capacity:
            return Refusal(
                says=f"a capacity of {self.capacity} tokens and steps of {self.step} cannot be",
                where="kv-static",
                hint="say how many tokens a sequence may have: kv-static{capacity=4096}",
            )
        return attempt(model, self._fix)

    def _fix(self, model: ir.Model) -> Change:
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.recognition.decoder import Unrecognised
        from ryzen_passes.kv.recognition.recognize import recognise
        from ryzen_passes.kv.static.rewrite import fix

        decoder = recognise(model)
        if decoder.longest is not None and self.capacity > decoder.longest:
            raise Unrecognised(
                f"{self.capacity} tokens are more than the {decoder.longest} positions that the model has a table of",
                decoder.clocks[0].value.name or "the table of positions",
                hint=f"kv-static{{capacity={decoder.longest}}}",
            )
        if self.capacity > decoder.looked:
            raise Unrecognised(
                f"what it hides was looked at over {decoder.looked} tokens, and a window may begin behind them",
                decoder.layers[0].attention.name or "Attention",
                hint=f"kv-static{{capacity={decoder.looked}}}, or export the model with caches",
            )
        change = fix(decoder, Known(model), self.capacity, self.step or None)
        self._bound_by_angles(model)
        return change

    def _bound_by_angles(self, model: ir.Model) -> None:
        """Tell the map where a table of angles ends; raise Unrecognised where that is before the capacity."""
        import msgspec

        from ryzen_compile.spec.kv_cache import attach
        from ryzen_passes.kv.recognition.decoder import Unrecognised
        from ryzen_passes.kv.recognition.rotation import Rotation, rotation_of
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed

        form = read_fixed(model)
        assert isinstance(form, FixedForm), form
        layer = form.layers[0]
        found = rotation_of(form, layer.key.new, layer.told.kv_heads, layer.told.key.size)
        if not isinstance(found, Rotation) or found.longest is None:
            return
        attach(model, msgspec.structs.replace(form.told, longest=min(found.longest, form.told.longest or found.longest)))
        if self.capacity > found.longest:
            raise Unrecognised(
                f"{self.capacity} tokens are more than the {found.longest} positions that its keys have angles for",
                layer.told.attention,
                hint=f"kv-static{{capacity={found.longest}}}",
            )

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes a cache that grows: where nothing is lost they are the same."""
        if not told.is_fixed or not told.is_exact or any(layer.method != "all" for layer in told.layers):
            return None
        from transformers import DynamicCache

        make: Callable[[], Any] = DynamicCache
        return make

    @classmethod
    def sees(cls, model: ir.Model) -> CacheMap:
        """Return the map of the caches of `model`, which is left as it is; raises ModelError where it is no decoder."""
        from ryzen_compile.errors import ModelError
        from ryzen_compile.spec.kv_cache import recorded
        from ryzen_passes.kv.recognition.decoder import Unrecognised
        from ryzen_passes.kv.recognition.recognize import recognise

        told = recorded(model)
        if told is not None:
            return told
        try:
            return recognise(model.clone()).as_map()
        except Unrecognised as why:
            raise ModelError(f"`{why.where}`: {why.says}", hint=why.hint) from None
