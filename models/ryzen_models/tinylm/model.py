"""tinylm's architecture: Llama's, at 2.8 M parameters, over bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED = 20
VOCAB_SIZE, MAX_POSITIONS = 256, 2048
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 64
HIDDEN_SIZE, INTERMEDIATE_SIZE = 256, 640
WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""float16, each weight by its name in transformers."""


def build_model() -> torch.nn.Module:
    """Return transformers' LlamaForCausalLM with fresh weights, seeded."""
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
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def load_trained() -> torch.nn.Module:
    """Return it with the trained weights, in float32."""
    from safetensors.torch import load_file

    model = build_model()
    missing, unknown = model.load_state_dict(
        {name: weight.float() for name, weight in load_file(WEIGHTS).items()}, strict=False
    )
    assert (missing, unknown) == (["lm_head.weight"], []), "the head is tied to the embedding"
    return model.eval()


def save_weights(model: torch.nn.Module) -> None:
    """Write the weights of `model` to WEIGHTS."""
    import torch
    from safetensors.torch import save_file

    kept = {name: weight.to(torch.float16) for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(kept, WEIGHTS)
