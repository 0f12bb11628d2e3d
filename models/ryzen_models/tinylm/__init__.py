"""tinylm: a byte-level Llama decoder trained on tasks that require its context; 2.8 M parameters, 2,048 tokens.

`README.md` in this folder describes the architecture, the training and the tasks. Token ids are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ryzen_compile.spec.recipe import Recipe
from ryzen_models import _decoders
from ryzen_models.tinylm.model import HEAD_DIM, KV_HEADS, LAYERS, MAX_POSITIONS, VOCAB_SIZE, load_trained
from ryzen_models.tinylm.questions import EVALUATION

if TYPE_CHECKING:
    import torch

    from ryzen_compile.spec.passes import Inputs


def make() -> torch.nn.Module:
    """Return the decoder with its trained weights, wrapped by `_decoders.with_caches`."""
    return _decoders.with_caches(load_trained())


INTERFACE = _decoders.make_interface(
    vocab_size=VOCAB_SIZE,
    max_positions=MAX_POSITIONS,
    layers=LAYERS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    typical_past=1024,
    max_sizes={"batch": 8, "seq": 512, "past": MAX_POSITIONS - 512},
)


def samples(seed: int) -> Iterator[Inputs]:
    """Yield the inputs of `_decoders.samples`."""
    return _decoders.samples(INTERFACE, seed)


RECIPE = Recipe(
    name="tinylm",
    description="byte-level Llama decoder, 2.8 M parameters, trained on prose, facts and questions about them",
    make_module=make,
    interface=INTERFACE,
    samples=samples,
    max_abs=1e-4,
    evaluation=EVALUATION,
)
