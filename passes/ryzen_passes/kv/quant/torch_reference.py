"""Quantised caches in plain torch: caches of transformers that keep what the codes of a rewritten graph stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec
from ryzen_passes.kv.evict.torch_reference import HiddenStateListener, TorchScorer, evicting_cache_factory
from ryzen_plugins.vector_quantize.levels import LEVELS, THRESHOLDS


def fake_quantize(vectors: torch.Tensor, storage_type: str | None) -> torch.Tensor:
    """Return what codes of `bits` keep of `vectors` (..., size), in their type; None: all."""
    if storage_type is None:
        return vectors
    wide = vectors.float()
    size = wide.abs()
    most = torch.where(size < torch.inf, size, 0.0).amax(dim=-1, keepdim=True)
    wide = torch.minimum(torch.maximum(wide.nan_to_num(0.0, torch.inf, -torch.inf), -most), most)
    kept = {"fp8": _fake_quantize_fp8, "8": _fake_quantize_int8, "4": _fake_quantize_int4}[storage_type](wide, most)
    return kept.to(vectors.dtype)


def _scale_and_clamp(values: torch.Tensor, scale: torch.Tensor, limit: float) -> torch.Tensor:
    return (values / torch.where(scale > 0, scale, 1.0)).clamp(-limit, limit)


def _fake_quantize_fp8(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = max_abs / 448
    return _scale_and_clamp(values, scale, 448).to(torch.float8_e4m3fn).float() * scale


def _fake_quantize_int8(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    scale = max_abs / 127
    return _scale_and_clamp(values, scale, 127).round() * scale


def _fake_quantize_int4(values: torch.Tensor, max_abs: torch.Tensor) -> torch.Tensor:
    turn, width = _hadamard_rotation(values.shape[-1]), values.shape[-1]
    norm = values.norm(dim=-1, keepdim=True)
    spread = (values / torch.where(norm > 0, norm, 1.0)) @ turn.T * width**0.5
    sizes = torch.tensor(LEVELS)[torch.bucketize(spread.abs(), torch.tensor(THRESHOLDS))]
    return torch.where(spread < 0, -sizes, sizes) @ turn * (norm / width**0.5)


def _hadamard_rotation(width: int) -> torch.Tensor:
    """Return the rotation of the codes: Sylvester's matrix, its columns with the signs of Rudin and Shapiro."""
    matrix, signs = torch.ones(1, 1), [1.0, 1.0]
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    while len(signs) < width:
        half, odd = divmod(len(signs), 2)
        signs.append(-signs[half] if odd and half % 2 else signs[half])
    return matrix * torch.tensor(signs) / width**0.5


class _UnquantizedScorer(TorchScorer):
    """A score that is told of keys and values as they were before they became codes."""

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
    """A layer that keeps what codes stand for."""

    def __init__(self, layer: Any, spec: LayerCacheSpec, scorer: _UnquantizedScorer | None) -> None:
        """Keep it as `layer` does, which evicts by `score` where there is one."""
        super().__init__()
        self._layer, self._storage_types, self._scorer = layer, (spec.key.storage_type, spec.value.storage_type), scorer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make it ready for keys and values of these shapes."""
        self._layer.lazy_initialization(key_states, value_states)

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """As torch_side.Watching says."""
        return self._layer.on_hidden_state(hidden_state) if isinstance(self._layer, HiddenStateListener) else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return what its queries see.

        Where tokens are evicted behind a step, that is the slots as they were and the step's own tokens as they came.
        """
        came = key_states, value_states
        if self._scorer is not None:
            self._scorer.unquantized = came
        seen = self._layer.update(*(fake_quantize(new, bits) for new, bits in zip(came, self._storage_types, strict=True)))
        self.is_initialized = True
        if self._scorer is None or seen[0] is self._layer.keys:
            return seen[0], seen[1]
        keys, values = (torch.cat([old[:, :, : -new.shape[2]], new], dim=2) for old, new in zip(seen, came, strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a step of `query_length` sees, and the position that a causal mask takes the first to have."""
        sizes: tuple[int, int] = self._layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return int(self._layer.get_seq_length())

    def get_max_length(self) -> int:
        """Return -1: sequences may be of any length."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized = False
        self._layer.reset()


def quantized_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a rewritten graph whose states are codes.

    `singles` and `module` are as in `Pass.in_torch`. Raises ModelError for what has no form in torch, or none without `module`.
    """
    if all(layer.method == "all" for layer in spec.layers):
        return lambda: Cache(layers=[QuantizedCacheLayer(DynamicLayer(), layer, None) for layer in spec.layers])
    evicts = evicting_cache_factory(spec, single_token=single_token, module=module, wrap_scorer=_UnquantizedScorer)

    def make() -> Cache:
        each = zip(evicts().layers, spec.layers, strict=True)
        return Cache(layers=[QuantizedCacheLayer(layer, one, layer.score) for layer, one in each])

    return make
