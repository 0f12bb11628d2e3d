"""kv-quant: caches of 4 or 8 bits an element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.static.cache_view import StaticCacheView

StorageType = Literal["fp8", "8", "4", "16"]


@dataclass(frozen=True, kw_only=True)
class KvQuant(Pass):
    """Keep keys and values as codes of 4 or 8 bits, with a float32 scale for every vector.

    A token is quantised when it is appended, and once. 4 bits are levels in a rotated basis (after TurboQuant, Zandieh et al.
    2025, arXiv 2504.19874), 8 bits whole numbers, fp8 float8 e4m3. It saves memory, and no time: what the codes stand for is
    written out for attention at every step.
    """

    name: ClassVar[str] = "kv-quant"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_UNQUANTIZED})

    keys: StorageType = "4"
    """Bits of an element of the keys; 16: they are left as they are."""
    values: StorageType = "4"
    """Bits of an element of the values; 16: they are left as they are."""
    protect: tuple[str, ...] = ()
    """Layers that are left as they are: `first`, `last`, or their numbers from 0."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states that are saved, scales paid for."""
        from ryzen_passes.kv.quant.rewrite import CODECS, check_storage_types
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return PassEstimate(reason=f"it would be refused: {form}")
        try:
            bits = self._storage_types(form)
            check_storage_types(form, bits)
        except PatternNotMatched as why:
            return PassEstimate(reason=f"it would be refused: {why.reason}")
        had = has = 0
        for layer, both in zip(form.layers, bits, strict=True):
            vectors = layer.spec.kv_heads * (layer.spec.slots or 0)
            for side, one in zip((layer.key, layer.value), both, strict=True):
                size, element = side.spec.head_size, side.past.dtype.numpy().itemsize if side.past.dtype is not None else 4
                had += vectors * size * element
                has += vectors * (CODECS[one].row_bytes(size) if one is not None else size * element)
        return PassEstimate(state_bytes=has - had, reason=f"keys and values are {has} bytes a sequence in place of {had}")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.quant.rewrite import quantize
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
        from ryzen_passes.kv.transaction import transaction

        if isinstance(form := read_static_cache_view(model), str):
            return Refusal(reason=form, location="the caches", hint="put kv-static{capacity=...} before it")
        if (held := KV_UNQUANTIZED.check(model)) is not None:
            return Refusal(reason=held, location="the caches", hint="list `kv-quant` once")

        def do(copy: ir.Model) -> Change:
            found = read_static_cache_view(copy)
            assert isinstance(found, StaticCacheView)
            bits = self._storage_types(found)
            if not any(one for both in bits for one in both):
                return Change(summary="every layer is protected, or left at 16 bits")
            return quantize(found, ModelInfo(copy), bits)

        return transaction(model, do)

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes caches that keep what the codes stand for; None where nothing is quantised."""
        if spec.is_unquantized:
            return None
        from ryzen_passes.kv.quant.torch_reference import quantized_cache_factory

        return quantized_cache_factory(spec, single_token=single_token, module=module)

    def _storage_types(self, view: StaticCacheView) -> list[tuple[str | None, str | None]]:
        """Return the bits of the keys and of the values by layer, None for what is left alone; raises Unrecognised."""
        from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched

        count, left = len(view.layers), set()
        for one in self.protect:
            at = {"first": 0, "last": count - 1}.get(one, int(one) if one.isdecimal() else count)
            if at >= count:
                raise PatternNotMatched(
                    f"`{one}` is no layer of a model that has {count}",
                    "protect",
                    hint=f"write first, last or numbers from 0 to {count - 1}: protect=[first,last]",
                )
            left.add(at)
        both = tuple(None if one == "16" else one for one in (self.keys, self.values))
        return [(None, None) if at in left else (both[0], both[1]) for at in range(count)]
