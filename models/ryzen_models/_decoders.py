"""Sizes of decoders of the Llama architecture, with their configuration and their interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.huggingface.decoders import CachedLayer, decoder_interface
from ryzen_compile.spec.interface import Interface

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """Sizes of a decoder of the Llama architecture."""

    vocab_size: int
    max_positions: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int

    def config(self, **options: Any) -> LlamaConfig:
        """Return the configuration of Transformers with these sizes and `options`."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
            attn_implementation="sdpa",
            **options,
        )

    def interface(self, *, typical_past: int, max_sizes: Mapping[str, int]) -> Interface:
        """Return the interface of the decoder with caches; `typical_past` is the typical number of cached tokens."""
        layer = CachedLayer(kv_heads=self.kv_heads, key_dim=self.head_dim, value_dim=self.head_dim)
        return decoder_interface(
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            layers=[layer] * self.layers,
            typical_past=typical_past,
            max_sizes=max_sizes,
        )
