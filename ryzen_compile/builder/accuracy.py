"""The check of a build: every variant against the graph that it was made from, before it ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.data.loading import named

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import Accuracy
    from ryzen_compile.builder.config import Resolved
    from ryzen_compile.builder.sources import Source
    from ryzen_compile.progress import Progress


def accuracy_of(graph: Path, source: Source, order: Resolved, progress: Progress) -> Accuracy:
    """Compare a variant with its source over the grid of its profiles; what comes out is recorded, met or not.

    Raises BackendError where one of the two cannot be run here.
    """
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.onnx_candidates import of_onnx

    wishes = order.wishes
    return compare(
        of_onnx(graph),
        of_onnx(Path(source.path)),
        criteria=order.criteria,
        profiles=order.profiles[source.name],
        samples=list(named(wishes.data, source.known.interface, seed=wishes.seed)) if wishes.data is not None else None,
        seed=wishes.seed,
        progress=progress,
    ).accuracy
