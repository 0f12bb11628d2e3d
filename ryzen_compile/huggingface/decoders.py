"""Decoders of Transformers with an explicit KV cache: ids and caches as inputs, logits and caches as outputs.

Names follow Hugging Face Optimum: `past_key_values.N.key` (batch, kv_heads, past, head_dim) is the cache before the step,
`present.N.key` (batch, kv_heads, past+seq, head_dim) the cache with the new rows appended. A call with past = 0 is a prefill;
a call with past > 0 and seq = 1 is a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, StateSpec, TensorSpec
from ryzen_compile.spec.profile import input_shapes
from ryzen_compile.spec.recipe import EvaluationData, Recipe

if TYPE_CHECKING:
    import torch

    from ryzen_compile.text.tokenizer import TextTokenizer

STEPS = ((2, 8, 5), (2, 12, 0), (3, 1, 16), (1, 1, 7), (4, 6, 3))
"""(batch, seq, past) of the samples: prefills with and without a past, and decoding steps."""


@dataclass(frozen=True, kw_only=True)
class CachedLayer:
    """The sizes of the KV cache of one layer."""

    kv_heads: int
    key_dim: int
    """The elements of a key per head."""
    value_dim: int
    """The elements of a value per head."""


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


def decoder_interface(
    *,
    vocab_size: int,
    max_positions: int,
    layers: Sequence[CachedLayer],
    typical_past: int,
    max_sizes: Mapping[str, int],
) -> Interface:
    """Return the interface of such a decoder; `typical_past` is the typical number of cached tokens."""

    def caches(prefix: str, length: str) -> list[dict[str, Any]]:
        return [
            {
                "name": f"{prefix}.{index}.{role}",
                "dtype": "float32",
                "dims": ("batch", layer.kv_heads, length, layer.key_dim if role == "key" else layer.value_dim),
            }
            for index, layer in enumerate(layers)
            for role in ("key", "value")
        ]

    return Interface(
        inputs=(
            InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=vocab_size - 1),
            InputSpec(name="attention_mask", dtype="int64", dims=("batch", "past+seq"), role="mask", padding_value=0),
            InputSpec(
                name="position_ids", dtype="int64", dims=("batch", "seq"), role="positions", low=0, high=max_positions - 1
            ),
            *(InputSpec(**cache, role="state") for cache in caches("past_key_values", "past")),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", dims=("batch", "seq", vocab_size)),
            *(TensorSpec(**cache) for cache in caches("present", "past+seq")),
        ),
        states=tuple(
            StateSpec(
                name=f"{index}.{role}", input=f"past_key_values.{index}.{role}", output=f"present.{index}.{role}", append_axis=2
            )
            for index in range(len(layers))
            for role in ("key", "value")
        ),
        batch="batch",
        task="language-model",
        typical_sizes={"batch": 1, "seq": 1, "past": typical_past},
        max_sizes=dict(max_sizes),
    )


def decoder_samples(
    interface: Interface, seed: int, make_ids: Callable[[int, int, int], Any] | None = None
) -> Iterator[Inputs]:
    """Yield the inputs of each of STEPS, with random caches and rows of different lengths.

    `make_ids` returns the ids of a step, (batch, seq), for the batch, the seq and a seed; None: random ids.
    """
    from ryzen_compile.data.synthetic import synthesize

    for index, (batch, seq, past) in enumerate(STEPS):
        shapes = input_shapes(interface, {"batch": batch, "seq": seq, "past": past})
        inputs = synthesize(interface, shapes, seed=1000 * seed + index, rows="mixed")
        if make_ids is not None:
            inputs["input_ids"] = make_ids(batch, seq, 1000 * seed + index)
        yield inputs


def decoder_recipe(
    *,
    name: str,
    description: str,
    make_module: Callable[[], torch.nn.Module],
    interface: Interface,
    max_abs: float | None = 1e-4,
    evaluation: EvaluationData | None = None,
    make_ids: Callable[[int, int, int], Any] | None = None,
    text_files: Callable[[], Mapping[str, bytes]] | None = None,
) -> Recipe:
    """Return the recipe of a decoder with caches in float32; `make_ids` is as for `decoder_samples`."""
    return Recipe(
        name=name,
        description=description,
        make_module=make_module,
        interface=interface,
        samples=lambda seed: decoder_samples(interface, seed, make_ids),
        max_abs=max_abs,
        evaluation=evaluation,
        text_files=text_files,
    )


def text_ids(tokenizer: TextTokenizer, texts: Sequence[str]) -> Callable[[int, int, int], Any]:
    """Return a function for `make_ids` of `decoder_samples`: windows of the tokenized `texts`, chosen by the seed."""
    import numpy as np

    ids = np.concatenate([tokenizer.encode(text) for text in texts])

    def make_ids(batch: int, seq: int, seed: int) -> Any:
        starts = np.random.default_rng(seed).integers(0, len(ids), batch)
        return np.stack([np.take(ids, np.arange(start, start + seq), mode="wrap") for start in starts])

    return make_ids
