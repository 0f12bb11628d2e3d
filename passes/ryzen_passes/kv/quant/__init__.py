"""kv-quant: caches of 4 or 8 bits an element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_EXACT, KV_FIXED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import CacheMap
    from ryzen_passes.kv.static.cache_view import FixedForm

Bits = Literal["fp8", "8", "4", "16"]


@dataclass(frozen=True, kw_only=True)
class KvQuant(Pass):
    """Keep keys and values as codes of 4 or 8 bits, with a float32 scale for every vector.

    A token is quantised when it is appended, and once. 4 bits are levels in a rotated basis (after TurboQuant, Zandieh et al.
    2025, arXiv 2504.19874), 8 bits whole numbers, fp8 float8 e4m3. It saves memory, and no time: what the codes stand for is
    written out for attention at every step.
    """

    name: ClassVar[str] = "kv-quant"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_EXACT})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_EXACT})

    keys: Bits = "4"
    """Bits of an element of the keys; 16: they are left as they are."""
    values: Bits = "4"
    """Bits of an element of the values; 16: they are left as they are."""
    protect: tuple[str, ...] = ()
    """Layers that are left as they are: `first`, `last`, or their numbers from 0."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are saved, scales paid for."""
        from ryzen_passes.kv.quant.rewrite import CODECS, check
        from ryzen_passes.kv.recognition.decoder import Unrecognised
        from ryzen_passes.kv.static.cache_view import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        try:
            bits = self._bits(form)
            check(form, bits)
        except Unrecognised as why:
            return Estimate(why=f"it would be refused: {why.says}")
        had = has = 0
        for layer, both in zip(form.layers, bits, strict=True):
            vectors = layer.told.kv_heads * (layer.told.slots or 0)
            for side, one in zip((layer.key, layer.value), both, strict=True):
                size, element = side.told.size, side.past.dtype.numpy().itemsize if side.past.dtype is not None else 4
                had += vectors * size * element
                has += vectors * (CODECS[one].row_bytes(size) if one is not None else size * element)
        return Estimate(state_bytes=has - had, why=f"keys and values are {has} bytes a sequence in place of {had}")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.quant.rewrite import quantise
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed
        from ryzen_passes.kv.transaction import attempt

        if isinstance(form := read_fixed(model), str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        if (held := KV_EXACT.check(model)) is not None:
            return Refusal(says=held, where="the caches", hint="list `kv-quant` once")

        def do(copy: ir.Model) -> Change:
            found = read_fixed(copy)
            assert isinstance(found, FixedForm)
            bits = self._bits(found)
            if not any(one for both in bits for one in both):
                return Change(says="every layer is protected, or left at 16 bits")
            return quantise(found, Known(copy), bits)

        return attempt(model, do)

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes caches that keep what the codes stand for; None where nothing is quantised."""
        if told.is_exact:
            return None
        from ryzen_passes.kv.quant.torch_reference import quantised

        return quantised(told, singles=singles, module=module)

    def _bits(self, form: FixedForm) -> list[tuple[str | None, str | None]]:
        """Return the bits of the keys and of the values by layer, None for what is left alone; raises Unrecognised."""
        from ryzen_passes.kv.recognition.decoder import Unrecognised

        count, left = len(form.layers), set()
        for one in self.protect:
            at = {"first": 0, "last": count - 1}.get(one, int(one) if one.isdecimal() else count)
            if at >= count:
                raise Unrecognised(
                    f"`{one}` is no layer of a model that has {count}",
                    "protect",
                    hint=f"write first, last or numbers from 0 to {count - 1}: protect=[first,last]",
                )
            left.add(at)
        both = tuple(None if one == "16" else one for one in (self.keys, self.values))
        return [(None, None) if at in left else (both[0], both[1]) for at in range(count)]
