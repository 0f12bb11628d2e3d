"""tinylm: a trained decoder of Llama's shape over bytes that needs its context: 2.8 M parameters, 2,048 tokens.

What it is, how it was trained and what it can do: `README.md` beside this file. Ids are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ryzen_compile.spec.recipe import Recipe
from ryzen_models import _decoders
from ryzen_models.tinylm.model import HEAD_DIM, KV_HEADS, LAYERS, LONGEST, VOCABULARY, trained
from ryzen_models.tinylm.questions import EVALUATION

if TYPE_CHECKING:
    import torch

    from ryzen_compile.spec.passes import Feed


def make() -> torch.nn.Module:
    """Return the decoder with its trained weights, as `_decoders.with_caches` says."""
    return _decoders.with_caches(trained())


INTERFACE = _decoders.interface(
    vocabulary=VOCABULARY,
    longest=LONGEST,
    layers=LAYERS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    typical=1024,
    largest={"batch": 8, "seq": 512, "past": LONGEST - 512},
)


def samples(seed: int) -> Iterator[Feed]:
    """Yield the feeds of `_decoders.samples`."""
    return _decoders.samples(INTERFACE, seed)


RECIPE = Recipe(
    name="tinylm",
    says="a decoder of Llama's shape over bytes, 2.8 M parameters, trained on prose, facts and questions about them",
    module=make,
    interface=INTERFACE,
    samples=samples,
    max_abs=1e-4,
    evaluation=EVALUATION,
)
