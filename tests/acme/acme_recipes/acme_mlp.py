"""acme-mlp: two layers with fixed random weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, TensorSpec
from ryzen_compile.spec.recipe import Recipe

WIDTH = 64


class TwoLayers(torch.nn.Module):
    """Compute relu(0.5 * x @ a) @ b for x (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random) / 8)
        self.b = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (batch, 64)."""
        return torch.relu(0.5 * (x @ self.a)) @ self.b


def samples(seed: int) -> Iterator[Inputs]:
    """Yield three representative inputs, of different batch sizes."""
    random = np.random.default_rng(seed)
    for batch in (4, 1, 16):
        yield {"x": random.normal(size=(batch, WIDTH)).astype(np.float32)}


RECIPE = Recipe(
    name="acme-mlp",
    description="two layers of width 64, 8 k parameters, random weights",
    make_module=lambda: TwoLayers().eval(),
    interface=Interface(
        inputs=(InputSpec(name="x", dtype="float32", dims=("batch", WIDTH), low=-4, high=4),),
        outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", WIDTH)),),
    ),
    samples=samples,
    max_abs=1e-5,
)
