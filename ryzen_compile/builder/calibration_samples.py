"""Calibration samples of a build: the user's, otherwise values drawn from a seed for enough tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ryzen_compile.builder.graph_samples import STEP_TOKENS, graph_samples
from ryzen_compile.spec.dims import dim_names
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile import InputShapes, Profile, input_shapes

_SAMPLES = 4
"""The number of samples of a model that reads no tokens."""
_TOKENS = 2 * STEP_TOKENS
"""The number of tokens to measure in all samples together."""
_MIN_TOKEN_SAMPLES, _MAX_TOKEN_SAMPLES = 2, 64


def calibration_samples(
    interface: Interface, profile: Profile, *, data: str | None, graph: Path, seed: int
) -> Sequence[Inputs]:
    """Return the samples of `data` for the graph in the file `graph`, otherwise random ones, deterministic in `seed`.

    Random ones have the opt shapes of `profile`; rows of tokens have up to 256 tokens if the profile allows it, and there are
    as many samples as it takes to measure 512 tokens, at most 64.
    """
    from ryzen_compile.data.synthetic import synthesize

    if data is not None:
        return graph_samples(data, interface, profile, graph, seed=seed)
    shapes = calibration_shapes(interface, profile)
    seeds = range(seed, seed + _sample_count(interface, shapes))
    return [synthesize(interface, shapes, seed=sample_seed, rows="mixed") for sample_seed in seeds]


def calibration_shapes(interface: Interface, profile: Profile) -> InputShapes:
    """Return the opt shapes of `profile`, with rows of up to 256 tokens as far as the profile allows."""
    token_axes = {spec.name: spec.dims[-1] for spec in interface.inputs if spec.role == "ids" and spec.dims}
    sizes: dict[str, int] = {}
    for spec in interface.inputs:
        for axis, dim in enumerate(spec.dims or ()):
            if isinstance(dim, str) and dim_names(dim) == (dim,):
                sizes[dim] = profile.opt[spec.name][axis]
    for name, dim in token_axes.items():
        if isinstance(dim, str) and dim in sizes:
            sizes[dim] = min(max(sizes[dim], STEP_TOKENS), profile.max[name][-1])
    shapes = {**profile.opt, **input_shapes(interface, sizes)}
    return shapes if profile.mismatch(shapes) is None else profile.opt


def _sample_count(interface: Interface, shapes: InputShapes) -> int:
    tokens = max((math.prod(shapes[spec.name]) for spec in interface.inputs if spec.role == "ids"), default=0)
    if not tokens:
        return _SAMPLES
    return min(max(math.ceil(_TOKENS / tokens), _MIN_TOKEN_SAMPLES), _MAX_TOKEN_SAMPLES)
