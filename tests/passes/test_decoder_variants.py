"""Architectures and RoPE scalings beside those of the matrix: kv-static is exact for each, or refuses it with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoders import VARIANTS, VOCABULARY, WINDOW, export, module, torch_steps
from support.rewritten_decoders import cache_spec, rewritten
from support.step_runner import StepRunner

from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic

CHUNKS = (7, 1, 1, 30, 1, 1, 5)
STYLES = {"cohere2": "dynamo-21", "phi3, longrope": "dynamo-21", "gemma2": "optimum-eager", "gpt-oss": "optimum-eager"}
"""The export style of architectures that the TorchScript exporter fails on, or that have no sdpa attention."""
REFUSALS = {"gpt-oss": "attention has a sink, a learned score beside those of the keys"}
EXACT = [name for name in VARIANTS if name not in REFUSALS]


def style(architecture: str) -> str:
    return STYLES.get(architecture, "optimum-sdpa")


@pytest.mark.parametrize("architecture", EXACT)
def test_static_caches_are_exact(architecture: str) -> None:
    model = rewritten(architecture, KvStatic(capacity=64), style=style(architecture))
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, sum(CHUNKS)))
    logits = StepRunner(model, 2).logits(ids, CHUNKS)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, CHUNKS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere2"])
def test_windows_of_single_layers_bound_their_slots(architecture: str) -> None:
    evict = KvEvict(score="knorm", budget="50", sinks=2, recent_window=8)
    model = rewritten(architecture, KvStatic(capacity=64, step=1), evict, style=style(architecture))
    assert [layer.policy.slots for layer in cache_spec(model).layers] == [WINDOW, 50]
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 50))
    logits = StepRunner(model, 2).logits(ids, [1] * 50)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, [50]), rtol=0, atol=1e-4)


def test_a_soft_cap_has_an_effect() -> None:
    """Otherwise its exactness would prove nothing."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 20))
    layers = [layer.self_attn for layer in module("gemma2").model.layers]
    capped = torch_steps("gemma2", ids, [20])
    try:
        for layer in layers:
            layer.attn_logit_softcapping = None
        assert np.abs(torch_steps("gemma2", ids, [20]) - capped).max() > 1e-2
    finally:
        for layer in layers:
            layer.attn_logit_softcapping = 2.0


@pytest.mark.parametrize("architecture", REFUSALS)
def test_what_is_not_supported_is_refused_with_the_reason(architecture: str) -> None:
    outcome = KvStatic(capacity=64).rewrite(load(export(architecture, style(architecture))), PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert REFUSALS[architecture] in outcome.reason
