"""The check of a build: every variant against the graph that it was made from, before it ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.data.loading import load_samples

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import AccuracyRecord
    from ryzen_compile.builder.config import ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress


def measure_accuracy(graph: Path, source: SourceGraph, build: ResolvedBuild, progress: Progress) -> AccuracyRecord:
    """Compare a variant with its source over the grid of its profiles; what comes out is recorded, met or not.

    Raises BackendError where one of the two cannot be run here.
    """
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.onnx_candidates import onnx_candidate

    wishes = build.config
    return compare(
        onnx_candidate(graph),
        onnx_candidate(Path(source.path)),
        criteria=build.criteria,
        profiles=build.profiles[source.name],
        samples=list(load_samples(wishes.data, source.summary.interface, seed=wishes.seed))
        if wishes.data is not None
        else None,
        seed=wishes.seed,
        progress=progress,
    ).accuracy
