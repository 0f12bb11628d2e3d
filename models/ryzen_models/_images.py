"""Synthetic image data: seeded images of 8 classes, and a classifier head fitted to one image of each class.

A classifier with random weights has many nearly equal logits, so that its top-1 measures noise. A head fitted to one image of
each class separates the classes with margins like those of a trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, TensorSpec
from ryzen_compile.spec.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch


SIZE, KINDS, CLASSES = 224, 8, 1000

BATCHES = (2, 1, 3, 4)
"""Batch sizes of the samples."""

INTERFACE = Interface(
    inputs=(InputSpec(name="pixel_values", dtype="float32", dims=("batch", 3, SIZE, SIZE), low=-1, high=1),),
    outputs=(TensorSpec(name="logits", dtype="float32", dims=("batch", CLASSES)),),
    batch="batch",
    task="classifier",
    typical_sizes={"batch": 1},
    max_sizes={"batch": 8},
)


def make_images(kinds: Sequence[int], *, seed: int) -> np.ndarray[Any, Any]:
    """Return one image for each class in `kinds`, (count, 3, 224, 224) float32 in [-1, 1].

    A class has its own colors, stripes and disc; images of one class differ in position, brightness and noise.
    """
    import numpy as np

    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    images = np.empty((len(kinds), 3, SIZE, SIZE), np.float32)
    for index, kind in enumerate(kinds):
        class_rng, image_rng = np.random.default_rng([SIZE, kind]), np.random.default_rng([SIZE, kind, seed, index])
        background, stripes, disc = class_rng.uniform(-0.8, 0.8, (3, 3, 1, 1))
        angle, waves, radius = class_rng.uniform(0, np.pi), 2 ** class_rng.uniform(1, 5), class_rng.uniform(0.15, 0.35)
        left, top = class_rng.uniform(0.3, 0.7, 2) + image_rng.uniform(-0.03, 0.03, 2)
        ramp = x * np.cos(angle) + y * np.sin(angle)
        image = background + stripes * np.sin(2 * np.pi * waves * ramp)
        image = np.where((x - left) ** 2 + (y - top) ** 2 < radius**2, disc, image)
        noise = 0.05 * image_rng.standard_normal((3, SIZE, SIZE))
        images[index] = np.clip(image + image_rng.uniform(-0.05, 0.05) + noise, -1, 1)
    return images


def logits_only(model: torch.nn.Module) -> torch.nn.Module:
    """Return a module around an image classifier of Transformers: pixel_values -> logits, in evaluation mode."""
    import torch

    class ImageClassifier(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
            return logits

    return ImageClassifier().eval()


def fit_head(head: torch.nn.Module, features: torch.Tensor) -> None:
    """Fit a linear head of 1,000 classes to the features, (8, width), of one image of each synthetic class.

    The weights of the first 8 classes are the features minus their mean, scaled to a logit of about 10; the weights of the
    other classes are random.
    """
    import torch

    mean = features.mean(0)
    centered = features - mean
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(KINDS))
    weight[:KINDS] = centered
    weight *= 10 / centered.norm(dim=1).mean() / weight.norm(dim=1, keepdim=True)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)


def samples(seed: int) -> Iterator[Inputs]:
    """Yield ten images of at least five classes, in an order determined by `seed`, in batches of 2, 1, 3 and 4."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(2 * KINDS) % KINDS
    start = 0
    for size in BATCHES:
        yield {"pixel_values": make_images(order[start : start + size].tolist(), seed=seed + 1)}
        start += size


def classifier_recipe(*, name: str, description: str, make_module: Callable[[], torch.nn.Module]) -> Recipe:
    """Return the recipe of an image classifier in float32, whose logits may differ by 1e-4 between backends."""
    return Recipe(
        name=name, description=description, make_module=make_module, interface=INTERFACE, samples=samples, max_abs=1e-4
    )
