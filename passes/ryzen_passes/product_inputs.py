"""Second moments of the inputs of matrix products, measured on calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import BackendError
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.weight_sites import WeightSite

Array = np.ndarray[Any, np.dtype[Any]]

_GROUP_BYTES = 1 << 29
"""The bytes of second moments that are measured in one run of the model."""


def measure_product_inputs(
    model: ir.Model, sites: Sequence[WeightSite], context: PassContext, *, alternative: str
) -> dict[str, Array] | Refusal:
    """Return the second moments of the inputs of each matrix, (length, length) float64, by the name of the weight.

    A matrix that nodes multiply by several inputs has the sum of their moments. Weights that are no matrices, or whose inputs
    are unknown, have none. Without samples the result is a refusal, whose hint names the `alternative`.
    """
    inputs = {str(site.weight.name): names for site in sites if (names := _input_names(site))}
    location = model.graph.name or "the graph"
    if not context.samples or context.measure_second_moments is None or context.samples_origin == "random":
        return Refusal(
            reason="activations on real inputs are needed, and there are no samples",
            location=location,
            hint=f"give samples with --data, or use {alternative}",
        )
    features = {name: site.length for site in sites for name in inputs.get(str(site.weight.name), ())}
    moments: dict[str, Array] = {}
    try:
        for group in _groups(features):
            moments |= context.measure_second_moments(model, group, context.samples)
    except BackendError as error:
        return Refusal(reason=error.message, location=location, hint=error.hint)
    return {weight: sum((moments[name] for name in names[1:]), moments[names[0]]) for weight, names in inputs.items()}


def _input_names(site: WeightSite) -> list[str]:
    """Return the names of the inputs of a matrix, which may be looked up too; empty if one is unknown or constant."""
    names: list[str] = []
    if len(site.tensor.shape) != 2:
        return names
    for read in site.reads:
        if read.kind == "product":
            if not read.activations or any(value.is_initializer() for value in read.activations):
                return []
            names += [str(value.name) for value in read.activations]
    return list(dict.fromkeys(names))


def _groups(features: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield groups of tensors whose second moments take at most `_GROUP_BYTES`."""
    group: list[str] = []
    size = 0
    for name, length in features.items():
        if group and size + 8 * length**2 > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += 8 * length**2
    if group:
        yield group
