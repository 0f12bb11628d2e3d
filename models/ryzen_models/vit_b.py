"""ViT-B/16: a vision transformer at 224 x 224 with random weights and a head fitted to 8 synthetic image classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_models._images import KINDS, classifier_recipe, fit_head, logits_only, make_images

if TYPE_CHECKING:
    import torch

SEED = 0


def make() -> torch.nn.Module:
    """Return the classifier: pixel_values (batch, 3, 224, 224) -> logits (batch, 1000)."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=1000, attn_implementation="sdpa"))
    model.to_empty(device="cpu").eval()
    initialize_weights(model, torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        features = model.vit(torch.from_numpy(make_images(range(KINDS), seed=SEED))).last_hidden_state[:, 0]
    fit_head(model.classifier, features.clone())
    return logits_only(model)


def initialize_weights(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Initialize the weights so that the class token depends on the image.

    Projections preserve the variance of their inputs, except that query and key projections increase the standard deviation by
    a factor of 1.5, so that attention is not uniform; norms and biases differ by channel. The default initialization of
    Transformers leaves attention nearly uniform.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5, generator=rng)
            elif weight.ndim == 1:
                weight.normal_(std=0.1, generator=rng)
            elif "embeddings" in name and "projection" not in name:
                weight.normal_(std=0.5, generator=rng)
            else:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(std=gain * weight[0].numel() ** -0.5, generator=rng)


RECIPE = classifier_recipe(
    name="vit-b",
    description="ViT-B/16 at 224 x 224, 86.6 M parameters, random weights, head fitted to 8 synthetic image classes",
    make_module=make,
)
