"""kv-quant: caches of 4 or 8 bits per element."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.errors import UsageError
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.kv.static_cache_pass import StaticCachePass
from ryzen_passes.properties import KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.quant.rewrite import LayerStorageTypes, QuantizationConfig
    from ryzen_passes.kv.scoring.statistics import Statistics
    from ryzen_passes.kv.static.cache_view import StaticCacheView

StorageTypeOption = Literal["fp8", "8", "4", "16"]
_KEYS_WITHOUT_MEAN = "keys of 4 bits from which no mean is subtracted cost Gemma 3 270M 11 % of perplexity"
_STATISTICS_ADVICE = ", and 4 % with `statistics`, which `calibrate` fits"
_BITS_ADVICE = "; keys=8,values=4 cost 0.2 %"


@dataclass(frozen=True, kw_only=True)
class KvQuant(StaticCachePass):
    """Store keys and values as codes of 4 or 8 bits, with a float32 scale per vector.

    A token is quantized once, when it is appended. `4` is a 16-level code in a rotated basis (after TurboQuant, Zandieh et al.
    2025, arXiv 2504.19874), `8` is int8, in the same basis if the head size is a power of two, `fp8` is float8 e4m3. The pass
    saves memory, not time: every step dequantizes the cache for attention.

    With `statistics` the mean of the keys is subtracted first, which does not change attention (SageAttention, Zhang et al.
    2024, arXiv 2410.02367).
    """

    name: ClassVar[str] = "kv-quant"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_UNQUANTIZED})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_UNQUANTIZED})

    keys: StorageTypeOption = "8"
    """Storage type of the keys: `4`, `8` or `fp8`; `16`: not quantized."""
    values: StorageTypeOption = "8"
    """Storage type of the values: `4`, `8` or `fp8`; `16`: not quantized."""
    protect: tuple[str, ...] = ()
    """Layers that are not quantized: `first`, `last`, or layer numbers from 0."""
    statistics: str = ""
    """Path of the file written by `calibrate`: the mean keys of each layer, which are subtracted before keys are quantized."""

    def configure(self, view: StaticCacheView, context: PassContext) -> QuantizationConfig | Refusal:
        """Return the configuration of the rewrite, or the reason why a cache does not support its storage type."""
        from ryzen_passes.kv.quant.rewrite import QuantizationConfig, check_storage_types
        from ryzen_passes.kv.scoring.statistics_option import reference

        if (problem := KV_UNQUANTIZED.check(view.model)) is not None:
            return Refusal(reason=problem, location="caches", hint="list `kv-quant` once")
        storage_types = self._storage_types(view)
        check_storage_types(view, storage_types)
        statistics = self._load_statistics(view)
        if isinstance(statistics, Refusal):
            return statistics
        return QuantizationConfig(
            storage_types=storage_types,
            statistics=statistics,
            statistics_ref=None if statistics is None else reference(self.statistics),
        )

    def _load_statistics(self, view: StaticCacheView) -> Statistics | Refusal | None:
        from ryzen_passes.kv.quant.key_mean import KEY_MEAN, key_mean_problem
        from ryzen_passes.kv.scoring.statistics_option import load_statistics

        if not self.statistics:
            return None
        if self.keys == "16":
            return Refusal(
                reason="`statistics` are mean keys, and keys=16 quantizes no keys", location="statistics", hint="leave it out"
            )
        if (problem := key_mean_problem(view)) is not None:
            return Refusal(reason=problem, location="statistics", hint="leave out `statistics`")
        hint = "run `ryzen-compile calibrate MODEL FILE --for kv-quant --data TEXT`, and set statistics=FILE"
        return load_statistics(self.statistics, KEY_MEAN, view, hint=hint)

    def calibrate(self, model: ir.Model, documents: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit the mean keys of `model`, write them to `path`, and return a one-sentence summary with their share of the norm.

        Raises UsageError if the keys are not quantized.
        """
        from ryzen_passes.kv.quant.key_mean import KEY_MEAN, key_mean_estimators
        from ryzen_passes.kv.scoring.calibration import calibrate

        if self.keys == "16":
            raise UsageError("kv-quant{keys=16} quantizes no keys and takes no statistics", hint="calibrate for kv-quant")
        share = "share of the mean in the squared norms"
        return calibrate(model, KEY_MEAN, key_mean_estimators, documents, path, recent_window=0, share=share)

    def estimate_view(self, view: StaticCacheView, config: QuantizationConfig) -> PassEstimate:
        """Return the change in bytes of the states of one sequence, scales included."""
        from ryzen_passes.kv.quant.rewrite import CODECS

        old_bytes = new_bytes = 0
        for layer, types in zip(view.layers, config.storage_types, strict=True):
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
        config: QuantizationConfig,
        context: PassContext,
    ) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.quant.key_mean import key_mean_problem
        from ryzen_passes.kv.quant.rewrite import quantize

        if not any(storage_type for types in config.storage_types for storage_type in types):
            return Change(summary="every layer is protected, or has storage type 16")
        advice = _STATISTICS_ADVICE if key_mean_problem(view) is None else ""
        change = quantize(view, model_info, config)
        if self.keys != "4" or config.statistics is not None:
            return change
        return dataclasses.replace(change, warnings=(*change.warnings, f"{_KEYS_WITHOUT_MEAN}{advice}{_BITS_ADVICE}"))

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches that hold the dequantized vectors; None if nothing is quantized."""
        if spec.is_unquantized:
            return None
        from ryzen_passes.kv.quant.torch_reference import quantized_cache_factory

        return quantized_cache_factory(spec, single_token=single_token, module=module, statistics=statistics)

    def _storage_types(self, view: StaticCacheView) -> Sequence[LayerStorageTypes]:
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
