"""Llama: a small decoder of the Llama architecture with random weights and an explicit KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.huggingface.decoders import decoder_recipe, with_caches
from ryzen_models._decoders import LlamaSizes

if TYPE_CHECKING:
    import torch

SEED = 0
SIZES = LlamaSizes(
    vocab_size=4096, max_positions=2048, layers=4, heads=8, kv_heads=2, head_dim=64, hidden_size=512, intermediate_size=1376
)


def make() -> torch.nn.Module:
    """Return the decoder, wrapped by `with_caches`."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(SIZES.config())
    initialize_weights(model, torch.Generator().manual_seed(SEED))
    return with_caches(model)


def initialize_weights(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Initialize the weights so that the output depends on the context.

    Projections preserve the variance of their inputs, except that query and key projections double the standard deviation, so
    that attention is not uniform; norms differ by channel. The default initialization of Transformers leaves attention nearly
    uniform.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=rng)
            elif "embed_tokens" in name:
                weight.normal_(generator=rng)
            else:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(std=gain * weight.shape[1] ** -0.5, generator=rng)


RECIPE = decoder_recipe(
    name="llama",
    description="Llama decoder, 4 layers, 8 heads, 2 KV heads, 15.3 M parameters, random weights",
    make_module=make,
    interface=SIZES.interface(typical_past=256, max_sizes={"batch": 4, "seq": 128, "past": 512}),
)
