"""Exported decoders after passes, their cache specifications, and graphs that also output what a step computes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import Eviction, KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext
from support.decoders import cached_steps, export

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
"""The export style of most tests."""


def rewritten(architecture: str, *passes: Pass, style: str = STYLE, backend: str = "onnxruntime") -> ir.Model:
    """Return an exported decoder after `passes`, all of which change it."""
    model = load(export(architecture, style))
    for pass_ in passes:
        outcome = pass_.rewrite(model, PassContext(backend=backend))
        assert isinstance(outcome, Change), outcome
    return model


def cache_spec(model: ir.Model) -> KVCacheSpec:
    """Return the cache specification of a rewritten decoder."""
    spec = read_kv_cache_spec(model)
    assert spec is not None
    return spec


def reference_steps(
    model: torch.nn.Module,
    pass_: type[Pass],
    spec: KVCacheSpec,
    ids: Array,
    chunks: Sequence[int],
    *,
    single_token: bool = False,
    statistics: Sequence[Path] = (),
) -> Array:
    """Return the logits (batch, tokens, vocabulary) of a Transformers module with the caches of `pass_`, run in `chunks`."""
    make_cache = pass_.torch_cache_factory(spec, single_token=single_token, module=model, statistics=statistics)
    assert make_cache is not None
    return cached_steps(model, make_cache(), ids, chunks)


class InstrumentedLayer(NamedTuple):
    """The names of the values that a layer of an instrumented decoder outputs, and the factor of its logits."""

    query: str
    key: str
    value: str
    attended: str
    scale: float


class InstrumentedDecoder(NamedTuple):
    """A rewritten decoder with more outputs than its interface has."""

    model: ir.Model
    interface: Interface
    spec: KVCacheSpec
    layers: tuple[InstrumentedLayer, ...]


@functools.cache
def instrumented(architecture: str, *passes: Pass, backend: str = "onnxruntime", rescored: bool = False) -> InstrumentedDecoder:
    """Return a rewritten decoder that also outputs the step's queries, keys, values and attended values of every layer.

    With `rescored` it also outputs the scores of the cache that the step computes.
    """
    model = rewritten(architecture, *passes, backend=backend)
    interface, spec = interface_of(model), cache_spec(model)
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for node in model.graph for value in node.outputs}
    layers = []
    for layer in spec.layers:
        node = nodes[layer.attention_node]
        query = node.inputs[0]
        assert query is not None
        tensors = (query, values[layer.key.update], values[layer.value.update], node.outputs[0])
        model.graph.outputs.extend(tensors)
        scale = node.attributes.get_float("scale", layer.key.head_size**-0.5)
        layers.append(InstrumentedLayer(*(tensor.name or "" for tensor in tensors), scale))
    if rescored:
        policies = [layer.policy for layer in spec.layers if isinstance(layer.policy, Eviction)]
        states = {policy.score_state for policy in policies if policy.rescore_interval}
        model.graph.outputs.extend(values[f"{name}_rescored"] for name in states)
    return InstrumentedDecoder(model, interface, spec, tuple(layers))
