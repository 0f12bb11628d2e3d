"""Images: seeded pictures of 8 kinds, and a classifier that has seen one of each.

Seeded weights have no classes of their own: their largest logit is one among many near equals, and a top-1 over it measures
noise. A head that is set from one picture of each kind tells the kinds apart with the margins of a trained one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ryzen_compile.spec.passes import Inputs

SIZE, KINDS, CLASSES = 224, 8, 1000

BATCHES = (2, 1, 3, 4)
"""How the pictures are dealt to samples."""

INTERFACE = Interface(
    inputs=(InputSpec(name="pixel_values", dtype="float32", dims=("batch", 3, SIZE, SIZE), low=-1, high=1),),
    outputs=(TensorSpec(name="logits", dtype="float32", dims=("batch", CLASSES)),),
    batch="batch",
    task="classifier",
    typical_sizes={"batch": 1},
    max_sizes={"batch": 8},
)


def make_images(kinds: Sequence[int], *, seed: int) -> np.ndarray[Any, Any]:
    """Return a picture of each of `kinds`, (count, 3, 224, 224) float32 in [-1, 1].

    A kind has its colours, its waves and its disc; pictures of one kind differ by place, brightness and noise.
    """
    import numpy as np

    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    found = np.empty((len(kinds), 3, SIZE, SIZE), np.float32)
    for at, kind in enumerate(kinds):
        of_kind, own = np.random.default_rng([SIZE, kind]), np.random.default_rng([SIZE, kind, seed, at])
        ground, stripes, disc = of_kind.uniform(-0.8, 0.8, (3, 3, 1, 1))
        angle, waves, radius = of_kind.uniform(0, np.pi), 2 ** of_kind.uniform(1, 5), of_kind.uniform(0.15, 0.35)
        left, top = of_kind.uniform(0.3, 0.7, 2) + own.uniform(-0.03, 0.03, 2)
        ramp = x * np.cos(angle) + y * np.sin(angle)
        drawn = ground + stripes * np.sin(2 * np.pi * waves * ramp)
        drawn = np.where((x - left) ** 2 + (y - top) ** 2 < radius**2, disc, drawn)
        noise = 0.05 * own.standard_normal((3, SIZE, SIZE))
        found[at] = np.clip(drawn + own.uniform(-0.05, 0.05) + noise, -1, 1)
    return found


def fit_head(head: torch.nn.Module, features: torch.Tensor) -> None:
    """Set a linear head of 1,000 classes from the features, (8, width), of one picture of each kind.

    The first 8 classes are the kinds, each by the direction of its features from their mean, for a logit of about 10; the
    others point anywhere.
    """
    import torch

    mean = features.mean(0)
    apart = features - mean
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(KINDS))
    weight[:KINDS] = apart
    weight *= 10 / apart.norm(dim=1).mean() / weight.norm(dim=1, keepdim=True)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)


def samples(seed: int) -> Iterator[Inputs]:
    """Yield ten pictures of at least five kinds in an order that the seed decides, in batches of 2, 1, 3 and 4."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(2 * KINDS) % KINDS
    start = 0
    for size in BATCHES:
        yield {"pixel_values": make_images(order[start : start + size].tolist(), seed=seed + 1)}
        start += size
