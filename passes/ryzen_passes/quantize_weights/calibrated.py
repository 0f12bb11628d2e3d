"""Quantization of weights with the second moments of the activations that they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import BackendError
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.quantize_weights.codes import QuantizedWeight, quantized_with_codes
from ryzen_passes.quantize_weights.gptq import compensation, gptq

if TYPE_CHECKING:
    from ryzen_passes.quantize_weights.rewrite import WeightPlan

Array = np.ndarray[Any, np.dtype[Any]]

_GROUP_BYTES = 1 << 29
"""The bytes of second moments that are measured in one run of the model."""
_CHUNK_ELEMENTS = 1 << 24
"""The elements of a weight that are quantized together; its outputs are independent of each other."""


def measure_inputs(model: ir.Model, plans: Sequence[WeightPlan], context: PassContext) -> dict[str, Array] | Refusal:
    """Return the second moments of the inputs of each weight that only products read, by the name of the weight."""
    tensors = {str(item.site.weight.name): _activation_names(item) for item in plans}
    tensors = {weight: names for weight, names in tensors.items() if names}
    location = model.graph.name or "the graph"
    if not context.samples or context.measure_second_moments is None or context.samples_origin == "random":
        return Refusal(
            reason="`gptq` needs activations on real inputs, and there are no samples",
            location=location,
            hint="give samples with --data, or use algorithm=search",
        )
    features = {name: item.blocks.length for item in plans for name in tensors.get(str(item.site.weight.name), ())}
    moments: dict[str, Array] = {}
    try:
        for group in _groups(features):
            moments |= context.measure_second_moments(model, group, context.samples)
    except BackendError as error:
        return Refusal(reason=error.message, location=location, hint=error.hint)
    return {weight: sum((moments[name] for name in names[1:]), moments[names[0]]) for weight, names in tensors.items()}


def quantize_compensated(item: WeightPlan, second_moments: Array) -> QuantizedWeight | None:
    """Quantize a matrix by GPTQ; None if an element is not finite."""
    matrix = np.asarray(item.tensor.numpy())
    rows = matrix if item.site.axis == 0 else matrix.T
    factor, stored = compensation(second_moments), item.tensor.dtype.numpy()
    length, outputs = rows.shape
    codes = np.empty(matrix.shape, np.float32)
    scales = np.empty((length // item.blocks.size, outputs), np.float32)
    codes_of_rows = codes if item.site.axis == 0 else codes.T
    step = max(1, _CHUNK_ELEMENTS // length)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        chunk = rows[:, part].astype(np.float32, order="C")
        if not np.isfinite(chunk).all():
            return None
        codes_of_rows[:, part], scales[:, part] = gptq(chunk, factor, item.blocks.size, item.code_format, stored)
    in_order = scales if item.site.axis == 0 else scales.T
    shape = item.blocks.scale_shape
    return quantized_with_codes(
        item.tensor, item.blocks, item.code_format, codes, np.ascontiguousarray(in_order).reshape(shape)
    )


def _activation_names(item: WeightPlan) -> list[str]:
    """Return the names of the inputs of a matrix that only products read, or that is looked up too; empty for other weights."""
    names: list[str] = []
    if len(item.tensor.shape) != 2:
        return names
    for read in item.site.reads:
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
