"""Llama: a small decoder of Llama's shape with an explicit KV cache, seeded; ids and caches in, logits and caches out.

Names are those of Hugging Face Optimum: `past_key_values.N.key` (batch, kv_heads, past, head_dim) holds what came before,
`present.N.key` (batch, kv_heads, past+seq, head_dim) the same with the new rows appended. Without a past, of length 0, a call
is a prefill; with one and `seq` = 1 it is a decoding step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ryzen_compile.interface import InputSpec, Interface, State, TensorSpec
from ryzen_compile.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from ryzen_compile.contract import Feed

SEED = 0
VOCABULARY, LONGEST = 4096, 2048
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64
WIDTH, INNER = HEADS * HEAD_DIM, 1376

STEPS = ((2, 8, 5), (2, 12, 0), (3, 1, 16), (1, 1, 7), (4, 6, 3))
"""(batch, seq, past) of the samples: continued and fresh prefills, and decoding steps."""


def make() -> torch.nn.Module:
    """Return the decoder: (input_ids, attention_mask, position_ids, key 0, value 0, ...) -> (logits, key 0, value 0, ...)."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    initialise(model, torch.Generator().manual_seed(SEED))
    return Decoder(model).eval()


def initialise(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Fill the weights so that what a token means depends on its context.

    Projections keep the variance of what they read, those of queries and keys widen it, so that attention prefers some rows
    over others; norms differ by channel. Made for training, transformers' own values leave attention uniform.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=rng)
            elif "embed_tokens" in name:
                weight.normal_(generator=rng)
            else:
                wide = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(std=wide * weight.shape[1] ** -0.5, generator=rng)


def _caches(prefix: str, length: str) -> list[dict[str, Any]]:
    return [
        {"name": f"{prefix}.{layer}.{kind}", "dtype": "float32", "dims": ("batch", KV_HEADS, length, HEAD_DIM)}
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]


INTERFACE = Interface(
    inputs=(
        InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=VOCABULARY - 1),
        InputSpec(name="attention_mask", dtype="int64", dims=("batch", "past+seq"), role="mask"),
        InputSpec(name="position_ids", dtype="int64", dims=("batch", "seq"), role="positions", low=0, high=LONGEST - 1),
        *(InputSpec(**cache, role="state") for cache in _caches("past_key_values", "past")),
    ),
    outputs=(
        TensorSpec(name="logits", dtype="float32", dims=("batch", "seq", VOCABULARY)),
        *(TensorSpec(**cache) for cache in _caches("present", "past+seq")),
    ),
    states=tuple(
        State(name=f"{layer}.{kind}", input=f"past_key_values.{layer}.{kind}", output=f"present.{layer}.{kind}", grows=2)
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ),
    batch="batch",
    task="language-model",
    typical={"batch": 1, "seq": 1, "past": 256},
    largest={"batch": 4, "seq": 128, "past": 512},
)


def samples(seed: int) -> Iterator[Feed]:
    """Yield a feed for each of STEPS; ids and caches are random, rows end at different lengths."""
    from ryzen_compile.data.synthetic import synthesize

    for at, (batch, seq, past) in enumerate(STEPS):
        shapes = {
            spec.name: (batch, KV_HEADS, past, HEAD_DIM)
            if spec.role == "state"
            else (batch, past + seq if spec.role == "mask" else seq)
            for spec in INTERFACE.inputs
        }
        yield synthesize(INTERFACE, shapes, seed=1000 * seed + at, rows="mixed")


RECIPE = Recipe(
    name="llama",
    says=f"a decoder of Llama's shape, {LAYERS} layers, {HEADS} heads over {KV_HEADS}, 15.3 M parameters, seeded",
    module=make,
    interface=INTERFACE,
    samples=samples,
    max_abs=1e-4,
)
