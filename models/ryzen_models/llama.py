"""Llama: a small decoder of the Llama architecture with random weights and an explicit KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ryzen_compile.spec.recipe import Recipe
from ryzen_models import _decoders

if TYPE_CHECKING:
    import torch

    from ryzen_compile.spec.passes import Inputs

SEED = 0
VOCAB_SIZE, MAX_POSITIONS = 4096, 2048
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64
HIDDEN_SIZE, INTERMEDIATE_SIZE = HEADS * HEAD_DIM, 1376


def make() -> torch.nn.Module:
    """Return the decoder, wrapped by `_decoders.with_caches`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    initialize_weights(model, torch.Generator().manual_seed(SEED))
    return _decoders.with_caches(model)


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


INTERFACE = _decoders.make_interface(
    vocab_size=VOCAB_SIZE,
    max_positions=MAX_POSITIONS,
    layers=LAYERS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    typical_past=256,
    max_sizes={"batch": 4, "seq": 128, "past": 512},
)


def samples(seed: int) -> Iterator[Inputs]:
    """Yield the inputs of `_decoders.samples`."""
    return _decoders.samples(INTERFACE, seed)


RECIPE = Recipe(
    name="llama",
    description=f"Llama decoder, {LAYERS} layers, {HEADS} heads, {KV_HEADS} KV heads, 15.3 M parameters, random weights",
    make_module=make,
    interface=INTERFACE,
    samples=samples,
    max_abs=1e-4,
)
