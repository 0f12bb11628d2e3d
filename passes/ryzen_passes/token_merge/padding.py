"""Which tokens are padding: read off the masks of attentions, which are computed for small inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.dims import resolve_dim
from ryzen_compile.spec.interface import InputSpec, Interface, PaddingValue
from ryzen_passes.attention_fusion import MASK_FILL_THRESHOLD, Mask
from ryzen_passes.position_subgraph import PositionSubgraph, ProbeError

Array = np.ndarray[Any, Any]
_BATCH, _TOKENS = 2, 7
"""The sizes for which masks are computed."""


def find_padding_mask(
    model: ir.Model, interface: Interface, masks: Sequence[Mask], shapes: ShapeInference
) -> tuple[ir.Value, PaddingValue] | None:
    """Return the input that marks padding, and the value that marks it; None if there is none and `masks` hide no token.

    Raises PatternNotMatched if a mask hides other tokens than padding, such as later ones, or changes the scores of others.
    """
    subgraph = PositionSubgraph(model, interface, shapes)
    inputs = [(value, interface.input(str(value.name))) for value in model.graph.inputs if subgraph.step_dependent.get(value)]
    markers = [(value, spec) for value, spec in inputs if spec.padding_value is not None and len(spec.dims or ()) == 2]
    if len(markers) > 1:
        raise PatternNotMatched("several inputs mark padding", markers[1][0])
    sizes: dict[str, int] = {}
    for spec in [*(spec for _, spec in markers), *interface.inputs]:
        for dim, size in zip(spec.dims or (), (_BATCH, _TOKENS)[: 1 if len(spec.dims or ()) > 2 else 2], strict=False):
            sizes.setdefault(str(dim), size)
    is_token = np.random.default_rng(0).random((_BATCH, _TOKENS)) < 0.5
    is_token[:, 0] = True
    feeds = {value: _feed(spec, is_token, sizes) for value, spec in inputs}
    expected = is_token[:, None, None, :] if markers else np.ones((1, 1, 1, 1), bool)
    for mask in dict.fromkeys(masks):
        try:
            visible = _visible(mask, subgraph.run(mask.value, sizes, feeds))
        except ProbeError as error:
            raise PatternNotMatched(f"the mask of an attention is not known: {error}", mask.value) from None
        if not _equal_if_broadcast(visible, expected):
            reason = f"a mask hides other tokens than `{markers[0][1].name}` marks" if markers else "a mask hides tokens"
            raise PatternNotMatched(reason, mask.value)
    if not markers or not masks:
        return None
    value, spec = markers[0]
    return value, spec.padding_value or 0


def _feed(spec: InputSpec, is_token: Array, sizes: Mapping[str, int]) -> Array:
    """Return marks of padding where `is_token` is false, or positions in order."""
    if spec.padding_value is not None and len(spec.dims or ()) == is_token.ndim:
        return np.asarray(is_token != bool(spec.padding_value)).astype(spec.dtype)
    shape = [resolve_dim(dim, sizes) for dim in spec.dims or ()]
    if None in shape:
        raise PatternNotMatched(f"the size of `{spec.name}` is unknown", spec.name)
    return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(spec.dtype)  # type: ignore[arg-type]


def _visible(mask: Mask, computed: Array) -> Array:
    """Return the scores that a mask leaves, bool. Raises PatternNotMatched if it changes some of them."""
    if mask.fill is not None:
        return np.asarray(computed.astype(bool) == mask.keep_if_true)
    scores = computed.astype(np.float64)
    visible = scores > MASK_FILL_THRESHOLD
    if scores[visible].any():
        raise PatternNotMatched("a bias is added to the scores of an attention, which depends on the positions", mask.value)
    return np.asarray(visible)


def _equal_if_broadcast(left: Array, right: Array) -> bool:
    try:
        return bool((left == right).all())
    except ValueError:
        return False
