"""PyTorch reference of kv-quant: a Transformers cache that holds the dequantized values of the codes in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import Eviction, KVCacheSpec, LayerCacheSpec, Quantization
from ryzen_passes.kv.evict.torch_reference import HiddenStateListener, evicting_cache_factory
from ryzen_passes.kv.quant.key_mean import KEY_MEAN
from ryzen_passes.kv.scoring import TorchScorer
from ryzen_passes.kv.scoring.statistics import read_statistics
from ryzen_passes.kv.scoring.statistics_lookup import find_statistics
from ryzen_passes.kv.torch_caches import FULL_CACHE_HINT
from ryzen_plugins.vector_quantize.levels import LEVELS, THRESHOLDS


def fake_quantize(vectors: torch.Tensor, quantization: Quantization | None, mean: torch.Tensor | None = None) -> torch.Tensor:
    """Return `vectors` (..., head_size) after quantization and back; None: unchanged.

    `mean` (kv_heads, 1, head_size) is subtracted before and added after. The data type is that of `vectors`. Infinities count
    as the largest finite magnitude of the vector, NaN as 0.
    """
    if quantization is None:
        return vectors
    if mean is not None:
        return (fake_quantize(vectors.float() - mean, quantization) + mean).to(vectors.dtype)
    values, storage_type = vectors.float(), quantization.storage_type
    is_rotated_here = quantization.is_rotated and storage_type != "4"  # 4-bit codes include the rotation
    rotation = _hadamard_rotation(values.shape[-1]) if is_rotated_here else None
    if rotation is not None:
        values = values @ rotation.T
    magnitude = values.abs()
    max_abs = torch.where(magnitude < torch.inf, magnitude, 0.0).amax(dim=-1, keepdim=True)
    values = torch.minimum(torch.maximum(values.nan_to_num(0.0, torch.inf, -torch.inf), -max_abs), max_abs)
    dequantized = {"fp8": _fake_quantize_fp8, "8": _fake_quantize_int8, "4": _fake_quantize_int4}[storage_type](values, max_abs)
    if rotation is not None:
        dequantized = dequantized @ rotation
    return dequantized.to(vectors.dtype)


def _scale_and_clamp(values: torch.Tensor, scale: torch.Tensor, limit: float) -> torch.Tensor:
    return (values / torch.where(scale > 0, scale, 1.0)).clamp(-limit, limit)


def _fake_quantize_fp8(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = max_abs / 448
    return _scale_and_clamp(values, scale, 448).to(torch.float8_e4m3fn).float() * scale


def _fake_quantize_int8(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = max_abs / 127
    return _scale_and_clamp(values, scale, 127).round() * scale


def _fake_quantize_int4(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    rotation, width = _hadamard_rotation(values.shape[-1]), values.shape[-1]
    norm = values.norm(dim=-1, keepdim=True)
    rotated = (values / torch.where(norm > 0, norm, 1.0)) @ rotation.T * width**0.5
    levels = torch.tensor(LEVELS)[torch.bucketize(rotated.abs(), torch.tensor(THRESHOLDS))]
    return torch.where(rotated < 0, -levels, levels) @ rotation * (norm / width**0.5)


def _hadamard_rotation(width: int) -> torch.Tensor:
    """Return the rotation before quantization: a Sylvester Hadamard matrix with Rudin-Shapiro signs on its columns."""
    matrix, signs = torch.ones(1, 1), [1.0, 1.0]
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    while len(signs) < width:
        half, odd = divmod(len(signs), 2)
        signs.append(-signs[half] if odd and half % 2 else signs[half])
    return matrix * torch.tensor(signs) / width**0.5


class _UnquantizedScorer(TorchScorer):
    """Scorer that scores new tokens by their unquantized keys and values."""

    def __init__(self, scorer: TorchScorer) -> None:
        self._scorer = scorer
        self.unquantized: tuple[torch.Tensor, torch.Tensor] | None = None

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self.unquantized is not None
        self._scorer.hidden_state = self.hidden_state
        return self._scorer.score_new_tokens(*self.unquantized, positions)

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        return self._scorer.rescore(keys, seen_tokens)

    def reset(self) -> None:
        super().reset()
        self._scorer.reset()


class QuantizedCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cache layer that holds dequantized keys and values."""

    def __init__(
        self,
        layer: Any,
        spec: LayerCacheSpec,
        scorer: _UnquantizedScorer | None,
        *,
        single_token: bool,
        key_mean: torch.Tensor | None,
    ) -> None:
        """Wrap the cache layer `layer`; `scorer` is its scorer if it evicts tokens, else None.

        `key_mean` (kv_heads, 1, head_size) is subtracted from keys before they are quantized. With `single_token` the new token
        of a step of one token is read from the cache, as in a graph for single tokens.
        """
        super().__init__()
        self._has_ring, self._single_token = spec.has_exact_ring, single_token
        self._layer, self._scorer = layer, scorer
        self._quantizations = (spec.key.quantization, key_mean), (spec.value.quantization, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the tensors of the wrapped layer."""
        self._layer.lazy_initialization(key_states, value_states)

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """Pass the hidden state to the wrapped layer and return its mask, if any."""
        return self._layer.on_hidden_state(hidden_state) if isinstance(self._layer, HiddenStateListener) else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (batch, kv_heads, seq, head_size) of a step; return those that its queries attend to.

        If tokens are evicted after attention, these are the old slots and the unquantized tokens of the step.
        """
        unquantized = key_states, value_states
        if self._scorer is not None:
            self._scorer.unquantized = unquantized
        visible = self._layer.update(
            *(fake_quantize(new, *quantization) for new, quantization in zip(unquantized, self._quantizations, strict=True))
        )
        self.is_initialized = True
        reads_cache = self._single_token and key_states.shape[2] == 1
        if visible[0] is self._layer.keys if self._scorer is not None else reads_cache or not self._has_ring:
            return visible[0], visible[1]
        keys, values = (
            torch.cat([old[:, :, : -new.shape[2]], new], dim=2) for old, new in zip(visible, unquantized, strict=True)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys for a step of `query_length` tokens, and the position of the first key in a causal mask."""
        sizes: tuple[int, int] = self._layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Return the number of tokens seen so far."""
        return int(self._layer.get_seq_length())

    def get_max_length(self) -> int:
        """Return -1: the sequence length is unlimited."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.is_initialized = False
        self._layer.reset()


def quantized_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
) -> Callable[[], Cache]:
    """Return a factory for empty Transformers caches that follow the cache policy and storage types in `spec`.

    `single_token`, `module` and `statistics` are as in `KVCacheReference`. Raises ModelError if `spec` has no Transformers
    equivalent, or if `module` is needed and None.
    """
    key_means = _read_key_means(spec, statistics)
    if spec.is_dense:
        return lambda: Cache(
            layers=[
                QuantizedCacheLayer(DynamicLayer(), layer, None, single_token=single_token, key_mean=mean)
                for layer, mean in zip(spec.layers, key_means, strict=True)
            ]
        )
    for layer in spec.layers:
        if not isinstance(layer.policy, Eviction) and not layer.has_exact_ring:
            raise ModelError(
                f"quantized caches with the method `{layer.method}` have no Transformers equivalent",
                hint=FULL_CACHE_HINT,
            )
    create_evicting = evicting_cache_factory(
        spec, single_token=single_token, module=module, statistics=statistics, wrap_scorer=_UnquantizedScorer
    )

    def create() -> Cache:
        layers = zip(create_evicting().layers, spec.layers, key_means, strict=True)
        return Cache(
            layers=[
                QuantizedCacheLayer(layer, layer_spec, layer.scorer, single_token=single_token, key_mean=mean)
                for layer, layer_spec, mean in layers
            ]
        )

    return create


def _read_key_means(spec: KVCacheSpec, locations: Sequence[Path]) -> list[torch.Tensor | None]:
    """Return the mean keys (kv_heads, 1, head_size) of each layer; None: nothing is subtracted."""
    means: list[torch.Tensor | None] = []
    for index, layer in enumerate(spec.layers):
        reference = layer.key.quantization.statistics if layer.key.quantization is not None else None
        if reference is None:
            means.append(None)
            continue
        statistics = read_statistics(find_statistics(reference, locations))
        means.append(torch.from_numpy(statistics.tensor(index, KEY_MEAN))[:, None])
    return means
