"""kv-static: growing caches become states of fixed capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_STATIC

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec


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
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})

    capacity: int = 0
    """How many tokens a sequence may have in all: at least 1, at most the positions that the model has a table of."""
    step: int = 0
    """How many tokens a step takes: 1 for a graph that only decodes; 0: any number."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states; the growing caches that they replace were counted at no length."""
        from ryzen_passes.kv.recognition.recognize import recognize
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched

        try:
            layers = recognize(model.clone()).layers
        except PatternNotMatched as why:
            return PassEstimate(reason=f"it would be refused: {why.reason}")
        row = sum(layer.kv_heads * (layer.key.row_bytes + layer.value.row_bytes) for layer in layers)
        return PassEstimate(state_bytes=row * self.capacity, reason=f"{row} bytes a token and sequence, {self.capacity} tokens")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_passes.kv.transaction import transaction

        if self.capacity < 1 or self.step < 0 or self.step > self.capacity:
            return Refusal(
                reason=f"a capacity of {self.capacity} tokens and steps of {self.step} cannot be",
                location="kv-static",
                hint="say how many tokens a sequence may have: kv-static{capacity=4096}",
            )
        return transaction(model, self._make_static)

    def _make_static(self, model: ir.Model) -> Change:
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.recognition.recognize import recognize
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched
        from ryzen_passes.kv.static.rewrite import make_static

        decoder = recognize(model)
        if decoder.max_positions is not None and self.capacity > decoder.max_positions:
            raise PatternNotMatched(
                f"{self.capacity} tokens are more than the {decoder.max_positions} positions that the model has a table of",
                decoder.position_inputs[0].value.name or "the table of positions",
                hint=f"kv-static{{capacity={decoder.max_positions}}}",
            )
        if self.capacity > decoder.probed_length:
            raise PatternNotMatched(
                f"what it hides was looked at over {decoder.probed_length} tokens, and a window may begin behind them",
                decoder.layers[0].attention.name or "Attention",
                hint=f"kv-static{{capacity={decoder.probed_length}}}, or export the model with caches",
            )
        change = make_static(decoder, ModelInfo(model), self.capacity, self.step or None)
        self._limit_to_angle_table(model)
        return change

    def _limit_to_angle_table(self, model: ir.Model) -> None:
        """Tell the map where a table of angles ends; raise Unrecognised where that is before the capacity."""
        import msgspec

        from ryzen_compile.spec.kv_cache import write_kv_cache_spec
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched
        from ryzen_passes.kv.recognition.rotation import Rotation, recognize_rotation
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view

        form = read_static_cache_view(model)
        assert isinstance(form, StaticCacheView), form
        layer = form.layers[0]
        found = recognize_rotation(form, layer.key.update, layer.spec.kv_heads, layer.spec.key.head_size)
        if not isinstance(found, Rotation) or found.max_positions is None:
            return
        write_kv_cache_spec(
            model,
            msgspec.structs.replace(
                form.spec, max_positions=min(found.max_positions, form.spec.max_positions or found.max_positions)
            ),
        )
        if self.capacity > found.max_positions:
            raise PatternNotMatched(
                f"{self.capacity} tokens are more than the {found.max_positions} positions that its keys have angles for",
                layer.spec.attention_node,
                hint=f"kv-static{{capacity={found.max_positions}}}",
            )

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes a cache that grows: where nothing is lost they are the same."""
        if not spec.is_static or not spec.is_unquantized or any(layer.method != "all" for layer in spec.layers):
            return None
        from transformers import DynamicCache

        make: Callable[[], Any] = DynamicCache
        return make

    @classmethod
    def inspect(cls, model: ir.Model) -> KVCacheSpec:
        """Return the map of the caches of `model`, which is left as it is; raises ModelError where it is no decoder."""
        from ryzen_compile.errors import ModelError
        from ryzen_compile.spec.kv_cache import read_kv_cache_spec
        from ryzen_passes.kv.recognition.recognize import recognize
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched

        told = read_kv_cache_spec(model)
        if told is not None:
            return told
        try:
            return recognize(model.clone()).to_kv_cache_spec()
        except PatternNotMatched as why:
            raise ModelError(f"`{why.location}`: {why.reason}", hint=why.hint) from None
