"""A recipe: a module, how to export it, and the data that means something to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile.interface import Interface

if TYPE_CHECKING:
    import torch

    from ryzen_compile.contract import Feed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One graph of a model: what `ryzen-compile export NAME` exports and what everything later compares with.

    `samples` yields feeds that mean something, always the same ones for the same seed; the first also serves as the example
    that the exporter traces.
    """

    name: str
    says: str
    """What it is, in one line: the architecture, its size and where its weights come from."""
    module: Callable[[], torch.nn.Module]
    """Make the module, in eval mode. It takes the inputs in order, as tensors, and returns the outputs in order."""
    interface: Interface
    samples: Callable[[int], Iterable[Feed]]
    """Yield feeds, given a seed."""
    max_abs: float
    """The largest absolute difference from the module that the exported graph may show in any output, in float32."""
    opset: int = 23
