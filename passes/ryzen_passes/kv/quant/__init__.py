"""kv-quant: caches of 4 or 8 bits per element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.kv.static_cache_pass import StaticCachePass
from ryzen_passes.properties import KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.quant.rewrite import LayerStorageTypes
    from ryzen_passes.kv.static.cache_view import StaticCacheView

StorageTypeOption = Literal["fp8", "8", "4", "16"]


@dataclass(frozen=True, kw_only=True)
class KvQuant(StaticCachePass):
    """Store keys and values as codes of 4 or 8 bits, with a float32 scale per vector.

    A token is quantized once, when it is appended. `4` is a 16-level code in a rotated basis (after TurboQuant, Zandieh et al.
    2025, arXiv 2504.19874), `8` is int8, in the same basis if the head size is a power of two, `fp8` is float8 e4m3. The pass
    saves memory, not time: every step dequantizes the cache for attention.
    """

    name: ClassVar[str] = "kv-quant"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_UNQUANTIZED})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_UNQUANTIZED})

    keys: StorageTypeOption = "4"
    """Storage type of the keys: `4`, `8` or `fp8`; `16`: not quantized."""
    values: StorageTypeOption = "4"
    """Storage type of the values: `4`, `8` or `fp8`; `16`: not quantized."""
    protect: tuple[str, ...] = ()
    """Layers that are not quantized: `first`, `last`, or layer numbers from 0."""

    def configure(self, view: StaticCacheView, context: PassContext) -> list[LayerStorageTypes] | Refusal:
        """Return the storage types of keys and values of each layer, or the reason why a cache does not support its type."""
        from ryzen_passes.kv.quant.rewrite import check_storage_types

        if (problem := KV_UNQUANTIZED.check(view.model)) is not None:
            return Refusal(reason=problem, location="caches", hint="list `kv-quant` once")
        storage_types = self._storage_types(view)
        check_storage_types(view, storage_types)
        return storage_types

    def estimate_view(self, view: StaticCacheView, config: list[LayerStorageTypes]) -> PassEstimate:
        """Return the change in bytes of the states of one sequence, scales included."""
        from ryzen_passes.kv.quant.rewrite import CODECS

        old_bytes = new_bytes = 0
        for layer, types in zip(view.layers, config, strict=True):
            vectors = layer.spec.kv_heads * layer.slots
            for tensor, storage_type in zip((layer.key, layer.value), types, strict=True):
                row_bytes = tensor.row_bytes if storage_type is None else CODECS[storage_type].row_bytes(tensor.spec.head_size)
                old_bytes += vectors * tensor.row_bytes
                new_bytes += vectors * row_bytes
        return PassEstimate(
            state_bytes=new_bytes - old_bytes,
            reason=f"keys and values take {new_bytes} bytes per sequence instead of {old_bytes}",
        )

    def rewrite_view(
        self,
        view: StaticCacheView,
        model_info: ModelInfo,
        config: list[LayerStorageTypes],
        context: PassContext,
    ) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.quant.rewrite import quantize

        if not any(storage_type for types in config for storage_type in types):
            return Change(summary="every layer is protected, or has storage type 16")
        return quantize(view, model_info, config)

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches that hold the dequantized vectors; None if nothing is quantized."""
        if spec.is_unquantized:
            return None
        from ryzen_passes.kv.quant.torch_reference import quantized_cache_factory

        return quantized_cache_factory(spec, single_token=single_token, module=module, statistics=statistics)

    def _storage_types(self, view: StaticCacheView) -> list[LayerStorageTypes]:
        """Return the storage types of keys and values of each layer, None if not quantized.

        Raises PatternNotMatched if `protect` names a layer that does not exist.
        """
        from ryzen_compile.ir.patterns import PatternNotMatched

        count, protected = len(view.layers), set()
        for layer in self.protect:
            index = {"first": 0, "last": count - 1}.get(layer, int(layer) if layer.isdecimal() else count)
            if index >= count:
                raise PatternNotMatched(
                    f"`{layer}` is not a layer of the model, which has {count} layers",
                    "protect",
                    hint=f"use first, last or numbers from 0 to {count - 1}: protect=[first,last]",
                )
            protected.add(index)
        keys, values = (None if option == "16" else option for option in (self.keys, self.values))
        return [(None, None) if index in protected else (keys, values) for index in range(count)]
