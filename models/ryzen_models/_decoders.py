"""Transformers decoders with an explicit KV cache: ids and caches as inputs, logits and caches as outputs.

Names follow Hugging Face Optimum: `past_key_values.N.key` (batch, kv_heads, past, head_dim) is the cache before the step,
`present.N.key` (batch, kv_heads, past+seq, head_dim) the cache with the new rows appended. A call with past = 0 is a prefill;
a call with past > 0 and seq = 1 is a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, StateSpec, TensorSpec
from ryzen_compile.spec.recipe import EvaluationData, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig


STEPS = ((2, 8, 5), (2, 12, 0), (3, 1, 16), (1, 1, 7), (4, 6, 3))
"""(batch, seq, past) of the samples: prefills with and without a past, and decoding steps."""


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


def with_caches(model: torch.nn.Module) -> torch.nn.Module:
    """Wrap `model` as (input_ids, attention_mask, position_ids, key 0, value 0, ...) -> (logits, key 0, value 0, ...)."""
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return (outputs.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    return Decoder(model).eval()


def make_interface(size: LlamaSizes, *, typical_past: int, max_sizes: Mapping[str, int]) -> Interface:
    """Return the interface of such a decoder; `typical_past` is the typical number of cached tokens."""

    def caches(prefix: str, length: str) -> list[dict[str, Any]]:
        return [
            {"name": f"{prefix}.{layer}.{role}", "dtype": "float32", "dims": ("batch", size.kv_heads, length, size.head_dim)}
            for layer in range(size.layers)
            for role in ("key", "value")
        ]

    return Interface(
        inputs=(
            InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=size.vocab_size - 1),
            InputSpec(name="attention_mask", dtype="int64", dims=("batch", "past+seq"), role="mask"),
            InputSpec(
                name="position_ids", dtype="int64", dims=("batch", "seq"), role="positions", low=0, high=size.max_positions - 1
            ),
            *(InputSpec(**cache, role="state") for cache in caches("past_key_values", "past")),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", dims=("batch", "seq", size.vocab_size)),
            *(TensorSpec(**cache) for cache in caches("present", "past+seq")),
        ),
        states=tuple(
            StateSpec(
                name=f"{layer}.{role}", input=f"past_key_values.{layer}.{role}", output=f"present.{layer}.{role}", append_axis=2
            )
            for layer in range(size.layers)
            for role in ("key", "value")
        ),
        batch="batch",
        task="language-model",
        typical_sizes={"batch": 1, "seq": 1, "past": typical_past},
        max_sizes=dict(max_sizes),
    )


def samples(interface: Interface, seed: int) -> Iterator[Inputs]:
    """Yield the inputs of each of STEPS, with random ids and caches and rows of different lengths."""
    from ryzen_compile.data.synthetic import synthesize

    for index, (batch, seq, past) in enumerate(STEPS):
        sizes = {"batch": batch, "seq": seq, "past": past, "past+seq": past + seq}
        shapes = {
            spec.name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.dims or ())
            for spec in interface.inputs
        }
        yield synthesize(interface, shapes, seed=1000 * seed + index, rows="mixed")


def decoder_recipe(
    *,
    name: str,
    description: str,
    make_module: Callable[[], torch.nn.Module],
    interface: Interface,
    evaluation: EvaluationData | None = None,
) -> Recipe:
    """Return the recipe of a decoder with caches in float32, whose logits may differ by 1e-4 between backends."""
    return Recipe(
        name=name,
        description=description,
        make_module=make_module,
        interface=interface,
        samples=lambda seed: samples(interface, seed),
        max_abs=1e-4,
        evaluation=evaluation,
    )
