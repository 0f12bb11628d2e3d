"""kv-static: turn growing caches into states of fixed capacity."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_STATIC

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.recognition.recognized_decoder import Visibility


@dataclass(frozen=True, kw_only=True)
class KvStatic(Pass):
    """Give a decoder caches of fixed size that are written in place, so that every step has the same shapes.

    Exact. The keys and values of a token are stored in the slot of its position. The mask over all tokens, the position ids and
    the cache lengths are replaced by one state, the number of tokens that each sequence has seen; the remaining mask covers the
    tokens of the step, with padding after the tokens. A step, padding included, must fit into the free slots of every sequence.
    The other kv passes require this form.

    A layer with an attention window of less than `capacity` tokens keeps its window only, in a ring buffer.

    Attention is recognized by its structure, independent of the exporter. Masks and positions are recognized by evaluating
    their part of the graph on small inputs, which requires ONNX Runtime.
    """

    name: ClassVar[str] = "kv-static"
    changes_interface: ClassVar[bool] = True
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})

    capacity: int
    """Maximum number of tokens of a sequence, at least 1; at most the size of the model's position table, if it has one."""
    step: int = 0
    """Number of tokens of a step: 1 for a graph that only decodes; 0: any number."""
    ring_buffers: bool = True
    """Whether layers with an attention window keep their window only; if not, they have as many slots as other layers."""

    def with_step_width(self, width: int) -> KvStatic:
        """Return the pass with steps of `width` tokens; 0: any number."""
        return replace(self, step=width)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the bytes of the states of one sequence; the growing caches that they replace count as 0 bytes."""
        from ryzen_compile.ir.patterns import PatternNotMatched
        from ryzen_passes.kv.recognition.recognize import recognize

        try:
            layers = recognize(model.clone()).layers
        except PatternNotMatched as error:
            return error.to_refusal()
        row_bytes = [layer.kv_heads * (layer.key.row_bytes + layer.value.row_bytes) for layer in layers]
        slots = [self._ring_slots(layer.visibility) or self.capacity for layer in layers]
        reason = f"{sum(row_bytes)} bytes per token and sequence, {self.capacity} tokens"
        if rings := sum(count < self.capacity for count in slots):
            reason += f"; {rings} of {len(layers)} layers keep their attention window only"
        return PassEstimate(state_bytes=sum(map(operator.mul, row_bytes, slots)), reason=reason)

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.transaction import transaction

        hint = "set the maximum number of tokens of a sequence: kv-static{capacity=4096}"
        if self.capacity < 1:
            return Refusal(reason=f"`capacity` must be at least 1 (got {self.capacity})", location="kv-static", hint=hint)
        if self.step < 0 or self.step > self.capacity:
            return Refusal(
                reason=f"`step` must be between 0 and `capacity` (got step={self.step}, capacity={self.capacity})",
                location="kv-static",
                hint=hint,
            )
        return transaction(model, self._make_static)

    def _make_static(self, model: ir.Model) -> Change:
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_compile.ir.patterns import PatternNotMatched
        from ryzen_passes.kv.recognition.recognize import recognize
        from ryzen_passes.kv.ring_buffer import to_ring_buffers
        from ryzen_passes.kv.static.cache_view import read_static_cache_view
        from ryzen_passes.kv.static.rewrite import make_static

        decoder = recognize(model)
        if decoder.max_positions is not None and self.capacity > decoder.max_positions:
            raise PatternNotMatched(
                f"`capacity` {self.capacity} exceeds the position table, which has {decoder.max_positions} positions",
                decoder.position_inputs[0].value.name or "position table",
                hint=f"kv-static{{capacity={decoder.max_positions}}}",
            )
        if self.capacity > decoder.probed_length:
            raise PatternNotMatched(
                f"`capacity` {self.capacity} exceeds the probed length: the mask was evaluated over {decoder.probed_length} "
                "tokens only, and may apply a window beyond them",
                decoder.layers[0].attention.name or "Attention",
                hint=f"kv-static{{capacity={decoder.probed_length}}}, or export the model with caches",
            )
        rings = [self._ring_slots(layer.visibility) for layer in decoder.layers]
        change = make_static(decoder, ModelInfo(model), self.capacity, self.step or None)
        self._limit_to_angle_table(model)
        if any(rings):
            full = f"{rings.count(None)} layers store their keys and values in {self.capacity} slots each"
            change = replace(change, summary=full if None in rings else "every layer has an attention window")
        for window in sorted({slots for slots in rings if slots is not None}):
            layers = [index for index, slots in enumerate(rings) if slots == window]
            view = read_static_cache_view(model)
            change = change.then(to_ring_buffers(view, ModelInfo(model), layers, window=window, capacity=self.capacity))
        return change

    def _ring_slots(self, visibility: Visibility) -> int | None:
        """Return the slots of a layer with the `visibility`, if it has a ring buffer: its attention window."""
        window = visibility.window
        has_ring = self.ring_buffers and window is not None and window < self.capacity and not visibility.alibi_slopes
        return window if has_ring else None

    def _limit_to_angle_table(self, model: ir.Model) -> None:
        """Record the length of a RoPE table in the specification; raise PatternNotMatched if `capacity` exceeds it."""
        import msgspec

        from ryzen_compile.ir.patterns import PatternNotMatched
        from ryzen_compile.spec.kv_cache import write_kv_cache_spec
        from ryzen_passes.kv.recognition.rotation import Rotation, recognize_rotation
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        view = read_static_cache_view(model)
        layer = view.layers[0]
        rotation = recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.spec.key.head_size)
        if not isinstance(rotation, Rotation) or rotation.max_positions is None:
            return
        max_positions = min(rotation.max_positions, view.spec.max_positions or rotation.max_positions)
        write_kv_cache_spec(model, msgspec.structs.replace(view.spec, max_positions=max_positions))
        if self.capacity > rotation.max_positions:
            raise PatternNotMatched(
                f"`capacity` {self.capacity} exceeds the RoPE table of the keys, which has {rotation.max_positions} positions",
                layer.spec.attention_node,
                hint=f"kv-static{{capacity={rotation.max_positions}}}",
            )

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return the factory of a growing Transformers cache, which is equivalent; None if `spec` evicts or quantizes."""
        if not spec.is_static or not spec.is_unquantized or not spec.is_dense:
            return None
        from transformers import DynamicCache

        make: Callable[[], Any] = DynamicCache
        return make

    @classmethod
    def inspect(cls, model: ir.Model) -> KVCacheSpec:
        """Return the cache specification of `model`, which stays unchanged. Raises ModelError if it is not a decoder."""
        from ryzen_compile.errors import ModelError
        from ryzen_compile.ir.patterns import PatternNotMatched
        from ryzen_compile.spec.kv_cache import read_kv_cache_spec
        from ryzen_passes.kv.recognition.recognize import recognize

        spec = read_kv_cache_spec(model)
        if spec is not None:
            return spec
        try:
            return recognize(model.clone()).to_kv_cache_spec()
        except PatternNotMatched as error:
            raise ModelError(f"`{error.location}`: {error.reason}", hint=error.hint) from None
