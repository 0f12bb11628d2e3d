"""ResNet-50: a convolutional network at 224 x 224 with random weights and a head fitted to 8 synthetic image classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_models._images import KINDS, classifier_recipe, fit_head, logits_only, make_images

if TYPE_CHECKING:
    import torch

SEED = 0


def make() -> torch.nn.Module:
    """Return the classifier: pixel_values (batch, 3, 224, 224) -> logits (batch, 1000).

    The running statistics of each BatchNorm are computed from one image of each of the 8 synthetic classes.
    """
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    initialize_weights(model, torch.Generator().manual_seed(SEED))
    pixels = torch.from_numpy(make_images(range(KINDS), seed=SEED))
    with torch.no_grad():
        model.train()(pixels)
        features = model.eval().resnet(pixels).pooler_output.flatten(1)
    fit_head(model.classifier[1], features)
    return logits_only(model)


def initialize_weights(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Initialize the weights so that the features depend on the image; BatchNorms accumulate a cumulative average.

    The last norm of each block has a small scale, so that a block changes its input only slightly, as in a trained network.
    """
    import torch

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                scale = 0.25 if ".layer.2." in name else 1.0
                module.weight.uniform_(0.5 * scale, 1.5 * scale, generator=rng)
                module.bias.normal_(std=0.2 * scale, generator=rng)
            elif isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5, generator=rng)


RECIPE = classifier_recipe(
    name="resnet",
    description="ResNet-50 at 224 x 224, 25.6 M parameters, random weights, head fitted to 8 synthetic image classes",
    make_module=make,
)
