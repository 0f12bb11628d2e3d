"""The attention modules of a Transformers decoder, and the cache layer that each of them updates."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError

FULL_CACHE_HINT = "compare with the PyTorch module and a full cache"
"""The hint of a message about a method or a module without a Transformers equivalent."""


def attention_modules(module: torch.nn.Module, layer_count: int) -> list[torch.nn.Module]:
    """Return the attention modules of `module`, one per layer; raises ModelError if there are not `layer_count` of them."""
    attentions = [
        part for part in module.modules() if "Attention" in type(part).__name__ and isinstance(_layer_index(part), int)
    ]
    if sorted(map(_layer_index, attentions)) != [*range(layer_count)]:
        raise ModelError(
            f"the graph has {layer_count} attention layers, and {len(attentions)} attention modules were found in the module",
            hint=FULL_CACHE_HINT,
        )
    return attentions


def cache_layer_for(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CacheLayerMixin | None:
    """Return the layer of the cache among the arguments of `attention`, or None if there is no cache."""
    cache = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, Cache)), None)
    index = _layer_index(attention)
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


def _layer_index(attention: torch.nn.Module) -> Any:
    return getattr(attention, "layer_idx", None)
