"""tinylm's model: the Llama architecture with 2.8 M parameters and a vocabulary of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_models._decoders import LlamaSizes

if TYPE_CHECKING:
    import torch

SEED = 20
SIZES = LlamaSizes(
    vocab_size=256, max_positions=2048, layers=4, heads=4, kv_heads=2, head_dim=64, hidden_size=256, intermediate_size=640
)
WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""float16 weights, by their names in Transformers."""


def build_model() -> torch.nn.Module:
    """Return a LlamaForCausalLM of Transformers with seeded initial weights."""
    import torch
    from transformers import LlamaForCausalLM

    config = SIZES.config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True)
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def load_trained() -> torch.nn.Module:
    """Return the model in eval mode with the trained weights, in float32."""
    from safetensors.torch import load_file

    model = build_model()
    missing, unexpected = model.load_state_dict(
        {name: weight.float() for name, weight in load_file(WEIGHTS).items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], []), "only the head, tied to the embedding, may be missing"
    return model.eval()


def save_weights(model: torch.nn.Module) -> None:
    """Write the weights of `model` to WEIGHTS in float16."""
    import torch
    from safetensors.torch import save_file

    weights = {name: weight.to(torch.float16) for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, WEIGHTS)
