"""tinylm: a byte-level Llama decoder trained on tasks that require its context; 2.8 M parameters, 2,048 tokens.

`README.md` in this folder describes the architecture, the training and the tasks. Token ids are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.huggingface.decoders import decoder_recipe, with_caches
from ryzen_models.tinylm.model import SIZES, load_trained
from ryzen_models.tinylm.questions import EVALUATION

if TYPE_CHECKING:
    import torch


def make() -> torch.nn.Module:
    """Return the decoder with its trained weights, wrapped by `with_caches`."""
    return with_caches(load_trained())


RECIPE = decoder_recipe(
    name="tinylm",
    description="byte-level Llama decoder, 2.8 M parameters, trained on prose, facts and questions about them",
    make_module=make,
    interface=SIZES.interface(typical_past=1024, max_sizes={"batch": 8, "seq": 512, "past": SIZES.max_positions - 512}),
    evaluation=EVALUATION,
)
